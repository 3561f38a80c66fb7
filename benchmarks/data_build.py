"""A build of a corpus beside the bare tokenizer, with either backend; its size over the raw tokens; two processes.

The input is the standard library's own sources, several times over with different beginnings, as JSONL; gigatoken has
as many times more of it as it is faster, roughly, so that what a build costs once weighs as in life. Rates are text a
second of CPU time in this process, best of some alternating rounds, each with tokenizers that have seen nothing yet;
two processes are compared with one by the wall clock, each build a command of its own, which needs a quiet machine of
two cores or more (the load is in the result). What a build with gigatoken spends is told apart: reading the documents
alone, and writing their tokens alone.

    python benchmarks/data_build.py [--megabytes 60] [--out benchmarks/results/data_build.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megagpt.data import sources
from megagpt.data.build import build
from megagpt.data.shards import open_shard
from megagpt.data.task import Recipe
from megagpt.data.tokenizer import load_tokenizer, train_tokenizer, with_gigatoken
from megagpt.files import write_whole

_FASTER = 10
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


def build_anew(raw: Path, out: Path, tokenizer: Path, *, processes: int, fast: bool) -> None:
    shutil.rmtree(out, ignore_errors=True)
    build([str(raw)], out, tokenizer=tokenizer, recipe=RECIPE, processes=processes, fast=fast)


def command_seconds(raw: Path, out: Path, tokenizer: Path, *, processes: int) -> float:
    """What `megagpt data build` takes in a fresh process."""
    shutil.rmtree(out, ignore_errors=True)
    words = ["data", "build", str(raw), "--out", str(out), "--tokenizer", str(tokenizer)]
    words += ["--heldout", str(RECIPE.heldout), "--tasks", str(RECIPE.tasks), "--processes", str(processes)]
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "megagpt.cli", *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def read_all(raw: Path) -> None:
    for task in sources.cut([str(raw)], column="text", tasks=RECIPE.tasks, largest=1 << 27):
        for _ in sources.texts(task, "text"):
            pass


def write_all(folder: Path, documents: list[np.ndarray]) -> None:
    with open_shard(folder, "alone", dtype=np.dtype("<u2"), block_tokens=RECIPE.block_tokens) as shard:
        for document in documents:
            shard.add(document)
    shard.entry(folder, "alone", "train")


def rates(folder: Path, definition: Path, texts: list[str], rounds: int, *, fast: bool) -> dict[str, float]:
    """Of the bare tokenizer and of a build, alternately."""
    raw = folder / "raw.jsonl"
    raw.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    bare, whole, read, write = [], [], [], []
    for _ in range(rounds):
        tokenizer = load_tokenizer(definition)
        tokenizer = with_gigatoken(tokenizer, ()) if fast else tokenizer
        documents: list[np.ndarray] = []
        bare.append(cpu_seconds(lambda t=tokenizer, d=documents: d.extend(map(t.encode_document, texts))))
        whole.append(cpu_seconds(lambda: build_anew(raw, folder / "corpus", definition, processes=1, fast=fast)))
        read.append(cpu_seconds(lambda: read_all(raw)))
        write.append(cpu_seconds(lambda d=documents: write_all(folder, d)))
    name = "gigatoken" if fast else "tokenizers"
    seconds = {"bare": bare, "build": whole, "reading alone": read, "writing alone": write}
    return {
        f"{name}: megabytes": round(megabytes, 1),
        **{f"{name}: {part}, MB per CPU second": round(megabytes / min(taken), 2) for part, taken in seconds.items()},
        f"{name}: build over bare": round(min(bare) / min(whole), 3),
    }


def measure(folder: Path, texts: list[str], rounds: int) -> dict[str, float]:
    definition = folder / "tokenizer.json"
    definition.write_text(train_tokenizer(texts[:1000], RECIPE.vocabulary).definition, encoding="utf-8")
    many = [f"# times {time}\n{text}" for time in range(_FASTER) for text in texts]
    figures = rates(folder, definition, many, rounds, fast=True)
    del many
    figures |= rates(folder, definition, texts, rounds, fast=False)
    raw, out = folder / "raw.jsonl", folder / "corpus"
    entries = build([str(raw)], out, tokenizer=definition, recipe=RECIPE, processes=1).shards
    raw_bytes = sum(entry.tokens for entry in entries) * np.dtype("<u2").itemsize
    figures["tar over raw tokens"] = round(sum(entry.tar_bytes for entry in entries) / raw_bytes, 4)
    figures["tar and index over raw tokens"] = round(
        sum(entry.tar_bytes + entry.index_bytes for entry in entries) / raw_bytes, 4
    )
    walls: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for processes, seconds in walls.items():
            seconds.append(command_seconds(raw, out, definition, processes=processes))
    figures["two processes over one, wall"] = round(min(walls[1]) / min(walls[2]), 2)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=60, help="megabytes of text")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the best counts")
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
