"""A build of a corpus beside the bare tokenizer, with either backend; its size over the raw tokens; two processes.

The input is the standard library's own sources, several times over with different beginnings, as JSONL. Rates are
text a second of CPU time in this process, best of some alternating rounds; two processes are compared by the wall
clock, which needs a quiet machine of two cores or more (the load is in the result).

    python benchmarks/data_build.py [--megabytes 60] [--out benchmarks/results/data_build.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megagpt.data.build import build
from megagpt.data.task import Recipe
from megagpt.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer, with_gigatoken
from megagpt.files import write_whole

RECIPE = Recipe(heldout=0.0, tasks=8, vocabulary=8192)


def input_texts(size: int) -> list[str]:
    """Python sources of about `size` bytes in all."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in folder.rglob("*.py") if "site-packages" not in path.parts)
    sources = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    texts: list[str] = []
    held = number = 0
    while held < size:
        text = f"# copy {number // len(sources)}\n" + sources[number % len(sources)]
        texts.append(text)
        held += len(text.encode())
        number += 1
    return texts


def cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def encode_all(tokenizer: Tokenizer, texts: list[str]) -> None:
    for text in texts:
        tokenizer.encode_document(text)


def build_anew(raw: Path, out: Path, tokenizer: Path, *, processes: int, fast: bool) -> None:
    shutil.rmtree(out, ignore_errors=True)
    build([str(raw)], out, tokenizer=tokenizer, recipe=RECIPE, processes=processes, fast=fast)


def measure(folder: Path, texts: list[str], rounds: int) -> dict[str, float]:
    definition = folder / "tokenizer.json"
    definition.write_text(train_tokenizer(texts[:1000], RECIPE.vocabulary).definition, encoding="utf-8")
    raw, out = folder / "raw.jsonl", folder / "corpus"
    raw.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    bare = load_tokenizer(definition)
    figures: dict[str, float] = {"megabytes": round(megabytes, 1)}
    for name, fast in (("tokenizers", False), ("gigatoken", True)):
        tokenizer = with_gigatoken(bare, texts[:20]) if fast else bare
        alone, whole = [], []
        for _ in range(rounds):
            alone.append(cpu_seconds(lambda tokenizer=tokenizer: encode_all(tokenizer, texts)))
            whole.append(cpu_seconds(lambda fast=fast: build_anew(raw, out, definition, processes=1, fast=fast)))
        figures[f"{name}: bare, MB per CPU second"] = round(megabytes / min(alone), 2)
        figures[f"{name}: build, MB per CPU second"] = round(megabytes / min(whole), 2)
        figures[f"{name}: build over bare"] = round(min(alone) / min(whole), 3)
    entries = build([str(raw)], out, tokenizer=definition, recipe=RECIPE, processes=1).shards
    raw_bytes = sum(entry.tokens for entry in entries) * np.dtype("<u2").itemsize
    figures["tar over raw tokens"] = round(sum(entry.tar_bytes for entry in entries) / raw_bytes, 4)
    figures["tar and index over raw tokens"] = round(
        sum(entry.tar_bytes + entry.index_bytes for entry in entries) / raw_bytes, 4
    )
    walls: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for processes, seconds in walls.items():
            began = time.perf_counter()
            build_anew(raw, out, definition, processes=processes, fast=False)
            seconds.append(time.perf_counter() - began)
    figures["two processes over one, wall"] = round(min(walls[1]) / min(walls[2]), 2)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=60, help="megabytes of text")
    parser.add_argument("--rounds", type=int, default=2, help="rounds, of which the best counts")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    options = parser.parse_args()
    texts = input_texts(options.megabytes * 1_000_000)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), texts, options.rounds)
    for name, value in figures.items():
        print(f"{name:40} {value}")
    if options.out:
        result = {
            "command": f"python benchmarks/data_build.py --megabytes {options.megabytes} --rounds {options.rounds}",
            "date": time.strftime("%Y-%m-%d"),
            "hardware": f"{os.cpu_count()} cores {platform.machine()}, no GPU, load {os.getloadavg()[0]:.1f}",
            "versions": {"python": platform.python_version(), "numpy": np.__version__},
            "figures": figures,
        }
        write_whole(options.out, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
