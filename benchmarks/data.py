"""The data side in numbers: the loader beside a bare memory-map slice and its peers, resume, state and memory.

Synthetic corpora of log-normal documents (mean about 800 tokens), three of them mixed 5 : 3 : 2, shuffled. Readers
take turns for many short rounds, of which each one's best counts, so that all meet the machine's quiet moments;
everything is in the page cache, so this measures the cost per token and not a disk. The peers (MosaicML Streaming on
samples of 2,049 tokens, LitData's TokensLoader, webdataset with a document a member and webdataset on our own blocks)
read the same kind of documents, in an environment of their own that this script makes.

    python benchmarks/data.py [--tokens 50000000] [--peers FOLDER] [--out benchmarks/results/data.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
from _environments import python_with

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


def open_corpora(folder: Path, tokens: int) -> list[Corpus]:
    """The three corpora, written at the first call."""
    return [
        open_corpus(folder / name)
        if (folder / name).exists()
        else write_corpus(folder / name, tokens * share // sum(SHARES.values()), seed)
        for seed, (name, share) in enumerate(SHARES.items())
    ]


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
    corpora: list[Corpus],
    rows: int,
    packing: order.Packing,
    *,
    mask: bool,
    thread: bool,
    context: int = CONTEXT,
    consumed: int = 0,
) -> Generator[int, None, None]:
    """Tokens of each batch of the loader: three corpora, shuffled."""
    weights = {
        pack.source(corpus, context=context, packing=packing): share
        for corpus, share in zip(corpora, SHARES.values(), strict=True)
    }
    cursor = order.start(seed=1, context=context, packing=packing, weights=weights).advanced(consumed)
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


PEERS = ("mosaicml-streaming", "litdata", "webdataset-documents", "webdataset-blocks")
PEER_REQUIREMENTS = (
    "torch",
    "torchvision",
    "numpy<2.2",
    "webdataset",
    "filelock<4.2",
    "transformers<5",
    "mosaicml-streaming",
    "litdata",
)


class Peers:
    """The process that reads as the peers do; it answers with million tokens a second, or says why it cannot."""

    def __init__(self, python: Path, folder: Path) -> None:
        command = [str(python), str(Path(__file__).parent / "_data_peers.py"), str(folder)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def rate(self, name: str, seconds: float) -> float:
        requests, answers = cast("IO[str]", self._process.stdin), cast("IO[str]", self._process.stdout)
        requests.write(f"{name} {seconds}\n")
        requests.flush()
        answer = answers.readline().strip()
        if not answer or answer.startswith("failed"):
            print(f"{name}: {answer or 'its process ended'}", file=sys.stderr)
            return 0.0
        return float(answer)

    def close(self) -> None:
        cast("IO[str]", self._process.stdin).close()
        self._process.wait()


def resume_figures(corpora: list[Corpus]) -> dict[str, float]:
    """From a saved state at 10^9 sequences to the order of the next positions, and to a batch of real corpora."""
    sources = {order.Source(f"{number:064x}", 10**9 + number): 5 - number for number in range(3)}
    cursor = order.start(seed=1, context=CONTEXT, packing="chunk", weights=sources).advanced(10**9)
    state = json.dumps(cursor.to_dict())
    began = time.perf_counter()
    order.sequences(order.Cursor.from_dict(json.loads(state)), 10**9 + np.arange(1 << 14))
    ordered = time.perf_counter() - began
    began = time.perf_counter()
    fresh = [open_corpus(corpus.folder) for corpus in corpora]
    next(loader(fresh, 8, "chunk", mask=True, thread=True, consumed=10**9))
    return {
        "state_bytes": len(state),
        "order_at_1e9_seconds": round(ordered, 4),
        "open_and_first_batch_seconds": round(time.perf_counter() - began, 4),
    }


def memory_figures(corpora: list[Corpus], steps: int) -> dict[str, float]:
    """Peak memory after a tenth of many short steps, and after all of them."""
    batches = loader(corpora, 1, "chunk", mask=True, thread=False, context=64)
    deque((next(batches) for _ in range(steps // 10)), maxlen=0)
    early = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    deque((next(batches) for _ in range(steps - steps // 10)), maxlen=0)
    late = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"steps": steps, "peak_mib_after_a_tenth": early >> 10, "peak_mib_after_all": late >> 10}


def measure(folder: Path, tokens: int, rounds: int, seconds: float, python: Path | None) -> dict[str, float]:
    corpora = open_corpora(folder, tokens)
    flat = folder / "flat.bin"
    np.random.default_rng(9).integers(0, 50_000, tokens, dtype=np.uint16).tofile(flat)
    spans = [lengths for corpus in corpora for _, lengths in corpus.split("train").document_spans()]
    lengths = np.concatenate(spans)
    np.save(folder / "lengths.npy", lengths[np.cumsum(lengths) <= tokens])
    shutil.copytree(corpora[0].folder, folder / "blocks")
    mapped = np.memmap(flat, dtype=np.uint16, mode="r").view(np.ndarray)
    readers = {"bare memmap slices, 8 rows": bare_slices(mapped, 8)}
    for rows in (8, 32):
        for name, packing, mask, thread in READERS:
            readers[f"{name}, {rows} rows"] = loader(corpora, rows, packing, mask=mask, thread=thread)
    best = dict.fromkeys((*readers, *(PEERS if python else ())), 0.0)
    peers = Peers(python, folder) if python else None
    for _ in range(rounds):
        for name, batches in readers.items():
            best[name] = max(best[name], rate(batches, seconds))
        for name in PEERS if peers else ():
            best[name] = max(best[name], cast(Peers, peers).rate(name, seconds))
    if peers:
        peers.close()
    for batches in readers.values():
        batches.close()
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000_000, help="tokens of all three corpora together")
    parser.add_argument("--rounds", type=int, default=20, help="rounds, of which the best counts")
    parser.add_argument("--seconds", type=float, default=0.2, help="seconds a reader and round")
    parser.add_argument("--steps", type=int, default=1_000_000, help="steps over which memory must stay flat")
    parser.add_argument("--peers", type=Path, help="folder for the peers' environment; without it they are left out")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        python = python_with(PEER_REQUIREMENTS, options.peers) if options.peers else None
        best = measure(Path(folder), options.tokens, options.rounds, options.seconds, python)
        corpora = open_corpora(Path(folder), options.tokens)
        resume, memory = resume_figures(corpora), memory_figures(corpora, options.steps)
    yardstick = next(iter(best.values()))
    for name, value in best.items():
        print(f"{name:40} {value:8.1f} Mtok/s {value / yardstick:6.2f}x")
    print(resume, memory)
    if options.out:
        result = {
            "command": f"python benchmarks/data.py --tokens {options.tokens} --rounds {options.rounds}",
            "date": time.strftime("%Y-%m-%d"),
            "hardware": f"{os.cpu_count()} cores {platform.machine()}, no GPU, load {os.getloadavg()[0]:.1f}",
            "versions": {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__},
            "resume": resume,
            "memory": memory,
            "mtok_per_s": {name: round(value, 1) for name, value in best.items()},
        }
        write_whole(options.out, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
