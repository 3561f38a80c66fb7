"""`megagpt eval`: the loss of a run on held-out documents."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class Eval:
    """The loss of a run's newest checkpoint on held-out documents."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    corpus: tuple[str, ...] = ()
    """Corpora to evaluate on; none given: those of the run's mixture."""
    sequences: int = 256
    """Held-out sequences of each corpus."""
    json: bool = False
    """Print one JSON object instead of a table."""


def run_eval(options: Eval) -> int:
    """Print loss, perplexity and bits per byte on each corpus."""
    from megagpt.data.corpus import open_corpus
    from megagpt.evaluate import evaluate_corpus
    from megagpt.trained import default_device, open_trained

    trained = open_trained(options.run)
    data = trained.run.data
    corpora = [open_corpus(location, data) for location in options.corpus or data.mixture]
    for corpus in corpora:
        trained.refuse_other_tokenizer(corpus)
    device = default_device()
    gpt = trained.model(device)
    results = [
        evaluate_corpus(
            lambda batch: gpt(batch.to(device)),
            corpus,
            sequences=options.sequences,
            context=trained.run.model.context,
            micro_batch=trained.run.train.micro_batch,
            data=data,
        )
        for corpus in corpora
    ]
    if options.json:
        print(json.dumps({"step": trained.step, "evaluations": [dataclasses.asdict(item) for item in results]}))
        return 0
    print(f"{options.run}, step {trained.step:,}")
    for item in results:
        print(
            f"  {item.corpus:<16} loss {item.loss:.4f}  perplexity {item.perplexity:,.2f}  "
            f"{item.bits_per_byte:.4f} bits per byte  ({item.sequences:,} sequences, {item.tokens:,} tokens)"
        )
    return 0
