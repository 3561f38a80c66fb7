"""`megagpt generate`: continue a prompt with the newest checkpoint of a run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from megagpt.generate import Sampling, complete, generate

PROMPT_TOKENS = 16  # of a held-out document, to begin a sample for the report with


@dataclass(frozen=True, kw_only=True)
class Generate(Sampling):
    """Continue a prompt, token by token as it is drawn."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    prompt: str = ""
    """Text to continue; empty: begin a document."""
    json: bool = False
    """Print one JSON object with all texts, at the end."""


def run_generate(options: Generate) -> int:
    """Print the prompt and what follows it; a single sample streams, several come one below the other."""
    from megagpt.trained import default_device, open_trained

    trained = open_trained(options.run)
    gpt, tokenizer, model = trained.model(default_device()), trained.tokenizer(), trained.run.model
    if options.samples > 1 or options.json:
        texts = complete(gpt, model, tokenizer, options.prompt, options)
        if options.json:
            print(json.dumps({"prompt": options.prompt, "step": trained.step, "texts": texts}))
        else:
            print("\n----\n".join(options.prompt + text for text in texts))
        return 0
    print(options.prompt, end="", flush=True)
    for piece in generate(gpt, model, tokenizer, options.prompt, options):
        print(piece.text, end="", flush=True)
    print()
    return 0


def write_samples(out: Path, count: int) -> None:
    """Write `out`/samples.json: `count` texts that begin with held-out documents' first tokens, if any."""
    from megagpt.data.corpus import open_corpus
    from megagpt.files import write_whole
    from megagpt.trained import default_device, open_trained

    trained = open_trained(out)
    gpt, tokenizer, model = trained.model(default_device()), trained.tokenizer(), trained.run.model
    opened = [open_corpus(location, trained.run.data) for location in trained.run.data.mixture]
    corpora = [corpus for corpus in opened if corpus.has_heldout()]
    samples = []
    for number in range(count if corpora else 0):
        split = corpora[number % len(corpora)].split("heldout")
        starts, lengths = next(iter(split.document_spans()))
        which = number * len(starts) // count
        size = min(PROMPT_TOKENS, int(lengths[which]) - 1, model.context - 1)
        prompt = tokenizer.decode(split.read(int(starts[which]), int(starts[which]) + size))
        (text,) = complete(gpt, model, tokenizer, prompt, Sampling(seed=number))
        samples.append({"prompt": prompt, "text": text, "step": trained.step})
    write_whole(out / "samples.json", json.dumps(samples, indent=1))
