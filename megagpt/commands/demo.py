"""`megagpt demo`: the whole pipeline at small size, on text that every machine has.

Python's own library becomes two corpora (docstrings and sources), tokenised and sharded; a GPT trains on their mixture
through DeepSpeed, is evaluated on held-out documents beside honest yardsticks, saved, and sampled.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from megagpt import config

CORPORA = ("prose", "code")
HELDOUT = 0.02


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Raw text in; a trained, evaluated and sampled GPT out, with a report."""

    out: Path = Path("runs/demo")
    """Folder of the run; an earlier demo's run there is continued, or shown again if it is finished."""
    corpora: Path = Path("corpora")
    """Folder of the two corpora; they are built once."""


def run_demo(options: Demo) -> int:
    """The pipeline, step by step as a user would take it."""
    from megagpt.commands.train import run_train, train_defaults

    defaults = train_defaults("quickstart")
    build_corpora(options.corpora, vocabulary=defaults.model.vocabulary)
    weights = defaults.data.mixture.values()
    mixture = {str(options.corpora / name): weight for name, weight in zip(CORPORA, weights, strict=True)}
    parallel = replace(defaults.parallel, data=_ranks(defaults.train))
    run = replace(defaults, out=options.out, parallel=parallel, data=replace(defaults.data, mixture=mixture))
    print(f"\n$ megagpt train quickstart --out {options.out} --parallel.data {parallel.data}", flush=True)
    status = run_train(run)
    if status == 0:
        _compare(options)
    return status


def build_corpora(folder: Path, *, vocabulary: int) -> None:
    """Make `folder`/prose and `folder`/code, of one tokenizer trained on both; what is there already is kept."""
    from megagpt.data.build import build
    from megagpt.data.task import Recipe
    from megagpt.data.tokenizer import train_tokenizer
    from megagpt.data.workers import available_cores
    from megagpt.demo import write_corpora
    from megagpt.files import write_whole

    if all((folder / name / "manifest.json").exists() for name in CORPORA):
        return
    raw = [folder / "raw" / f"{name}.jsonl" for name in CORPORA]
    if not all(path.exists() for path in raw):
        print(f"reading the docstrings and sources of Python's library into {folder / 'raw'}", flush=True)
        write_corpora(folder / "raw")
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        print(f"training a byte-level BPE of {vocabulary:,} tokens on them", flush=True)
        texts = (json.loads(line)["text"] for path in raw for line in path.read_text(encoding="utf-8").splitlines())
        write_whole(tokenizer, train_tokenizer(texts, vocabulary).definition)
    for name, path in zip(CORPORA, raw, strict=True):
        print(
            f"\n$ megagpt data build {path} --out {folder / name} --tokenizer {tokenizer} --heldout {HELDOUT}",
            flush=True,
        )
        build(
            [str(path)],
            folder / name,
            tokenizer=tokenizer,
            recipe=Recipe(heldout=HELDOUT),
            processes=available_cores(),
        )


def _ranks(train: config.Train) -> int:
    """Two data-parallel ranks where there are two cores; on a GPU one."""
    from megagpt.data.workers import available_cores
    from megagpt.parallel.ranks import gpu_present

    wanted = 1 if gpu_present() else min(2, available_cores())
    return wanted if train.global_batch % (train.micro_batch * wanted) == 0 else 1


def _compare(options: Demo) -> None:
    """Held-out bits per byte of the model and of the yardsticks, on the same text; then the report once more."""
    import numpy as np

    from megagpt.data.corpus import open_corpus
    from megagpt.data.tokenizer import token_byte_lengths
    from megagpt.demo import yardsticks
    from megagpt.files import write_whole
    from megagpt.report.html import write_report

    corpora = [open_corpus(options.corpora / name) for name in CORPORA]
    tokenizer = corpora[0].tokenizer()
    splits = {name: [corpus.split(name) for corpus in corpora] for name in ("train", "heldout")}
    train, heldout = (np.concatenate([part.read(0, part.tokens) for part in parts]) for parts in splits.values())
    words = heldout[heldout != tokenizer.end_of_text]
    text = tokenizer.decode(words).encode()
    found = yardsticks(train, heldout, token_byte_lengths(tokenizer), text)
    found["model_bits_per_byte"] = _model_bits_per_byte(options)
    write_whole(options.out / "yardsticks.json", json.dumps(found))
    names = {"unigram": "unigram model", "bigram": "bigram model", "xz": "xz -9", "model": "this GPT"}
    print(f"\nheld-out text, {len(text):,} bytes          bits per byte")
    for name, label in names.items():
        print(f"  {label:<34} {found[f'{name}_bits_per_byte']:.3f}")
    print(
        f"\nreport: {write_report(options.out)}\n"
        f'next:   megagpt generate {options.out} --prompt "def "\n'
        f"        megagpt eval {options.out}"
    )


def _model_bits_per_byte(options: Demo) -> float:
    """Of the newest checkpoint, on every held-out token of both corpora."""
    from megagpt.data.corpus import open_corpus
    from megagpt.evaluate import evaluate_corpus
    from megagpt.trained import default_device, open_trained

    trained, device = open_trained(options.out), default_device()
    gpt, run = trained.model(device), trained.run
    results = [
        evaluate_corpus(
            lambda batch: gpt(batch.to(device)),
            open_corpus(options.corpora / name),
            sequences=10**9,
            context=run.model.context,
            micro_batch=run.train.micro_batch,
            data=run.data,
        )
        for name in CORPORA
    ]
    return sum(result.bits_per_byte * result.bytes for result in results) / sum(result.bytes for result in results)
