"""Tokens a second of the streaming loader beside a bare memory-map slice, in one run and alternating.

Synthetic corpora of log-normal documents (mean about 800 tokens), three of them mixed 5 : 3 : 2, shuffled, best of
several rounds; everything in the page cache, so this measures the cost per token of the loader and not of a disk.

    python benchmarks/loader.py [--tokens 50000000] [--out loader.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import torch

from megagpt.data import order, pack
from megagpt.data.corpus import Corpus, open_corpus
from megagpt.data.loader import train_steps
from megagpt.data.manifest import Counts, Manifest, save_manifest
from megagpt.data.prefetch import Prefetched
from megagpt.data.shards import BLOCK_TOKENS, open_shard
from megagpt.data.tokenizer import train_tokenizer
from megagpt.files import write_whole

CONTEXT = 2048
SHARES = {"a": 5, "b": 3, "c": 2}
READERS: tuple[tuple[str, order.Packing, bool, bool], ...] = (
    ("chunk", "chunk", False, False),
    ("chunk + cu_seqlens", "chunk", True, False),
    ("best_fit + cu_seqlens", "best_fit", True, False),
    ("chunk + cu_seqlens, thread", "chunk", True, True),
)


def write_corpus(folder: Path, tokens: int, seed: int) -> Corpus:
    """A corpus of random tokens in documents of log-normal lengths, in shards of 16 million tokens."""
    generator = np.random.default_rng(seed)
    folder.mkdir()
    tokenizer = train_tokenizer([], 257)
    (folder / "tokenizer.json").write_text(tokenizer.definition, encoding="utf-8")
    entries = []
    while tokens > 0:
        size = min(tokens, 1 << 24)
        name = f"train-{len(entries):05d}-00"
        with open_shard(folder, name, dtype=np.dtype("<u2"), block_tokens=BLOCK_TOKENS) as shard:
            while shard.tokens < size:
                length = int(np.clip(generator.lognormal(6.18, 1.0), 2, 60_000))
                shard.add(generator.integers(0, 50_000, length, dtype=np.uint16))
        entries.append(shard.entry(folder, name, "train"))
        tokens -= size
    manifest = Manifest(
        tokenizer_sha256=tokenizer.sha256(),
        vocabulary=50_000,
        end_of_text=0,
        dtype="uint16",
        options={"seed": seed},
        source_files=0,
        empty_documents=0,
        counts={"train": Counts(), "heldout": Counts()},
        shards=tuple(entries),
    )
    save_manifest(folder, manifest)
    return open_corpus(folder)


def bare_slices(tokens: np.ndarray, rows: int) -> Generator[int, None, None]:
    """The yardstick: an int64 batch of random slices of one memory map, with neither targets nor documents."""
    generator = np.random.default_rng(0)
    while True:
        for start in generator.integers(0, len(tokens) - CONTEXT - 1, 4096).reshape(-1, rows):
            batch = np.empty((rows, CONTEXT + 1), dtype=np.int64)
            for row, first in enumerate(start.tolist()):
                batch[row] = tokens[first : first + CONTEXT + 1]
            yield batch.shape[0] * CONTEXT


def rate(batches: Iterator[int], seconds: float) -> float:
    """Million tokens a second."""
    next(batches)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        done += next(batches)
    return done / (time.perf_counter() - began) / 1e6


def loader(
    corpora: list[Corpus], rows: int, packing: order.Packing, *, mask: bool, thread: bool
) -> Generator[int, None, None]:
    """Tokens of each batch of the loader: three corpora, shuffled."""
    weights = {
        pack.source(corpus, context=CONTEXT, packing=packing): share
        for corpus, share in zip(corpora, SHARES.values(), strict=True)
    }
    cursor = order.start(seed=1, context=CONTEXT, packing=packing, weights=weights)
    steps = train_steps(
        corpora,
        cursor,
        global_batch=lambda _consumed: rows,
        micro_batch=rows,
        data_rank=0,
        data_ranks=1,
        document_mask=mask,
        pin=False,
    )
    if not thread:
        yield from (step[0].tokens_BT.numel() for step in steps)
    with Prefetched(steps, 4) as ahead:
        yield from (step[0].tokens_BT.numel() for step in ahead)


def measure(folder: Path, tokens: int, rounds: int, seconds: float) -> dict[str, float]:
    corpora = [
        write_corpus(folder / name, tokens * share // sum(SHARES.values()), seed)
        for seed, (name, share) in enumerate(SHARES.items())
    ]
    flat = folder / "flat.bin"
    np.random.default_rng(9).integers(0, 50_000, tokens, dtype=np.uint16).tofile(flat)
    mapped = np.memmap(flat, dtype=np.uint16, mode="r").view(np.ndarray)
    readers = {"bare memmap slices, 8 rows": bare_slices(mapped, 8)}
    for rows in (8, 32):
        for name, packing, mask, thread in READERS:
            readers[f"{name}, {rows} rows"] = loader(corpora, rows, packing, mask=mask, thread=thread)
    best = dict.fromkeys(readers, 0.0)
    for _ in range(rounds):
        for name, batches in readers.items():
            best[name] = max(best[name], rate(batches, seconds))
    for batches in readers.values():
        batches.close()
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000_000, help="tokens of all three corpora together")
    parser.add_argument("--rounds", type=int, default=20, help="rounds, of which the best counts")
    parser.add_argument("--seconds", type=float, default=0.2, help="seconds a reader and round")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        best = measure(Path(folder), options.tokens, options.rounds, options.seconds)
    yardstick = next(iter(best.values()))
    for name, value in best.items():
        print(f"{name:40} {value:8.1f} Mtok/s {value / yardstick:6.2f}x")
    if options.out:
        result = {
            "command": f"python benchmarks/loader.py --tokens {options.tokens} --rounds {options.rounds}",
            "date": time.strftime("%Y-%m-%d"),
            "hardware": f"{os.cpu_count()} cores {platform.machine()}, no GPU, load {os.getloadavg()[0]:.1f}",
            "versions": {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__},
            "mtok_per_s": {name: round(value, 1) for name, value in best.items()},
        }
        write_whole(options.out, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
