"""The wait for data of a run that reads its corpus from an S3 server 20 ms away over a line of 100 MB/s.

moto's server on this machine, behind the tests' proxy, which makes every request wait 20 ms and shares 100 MB/s among
all connections. A step is a sleep of 250 ms; the cache is empty at the beginning. The first step, which has nothing
fetched ahead, is told apart.

    PYTHONPATH=. python benchmarks/remote.py [--steps 60] [--rows 32] [--out remote.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from benchmarks.data import CONTEXT, write_corpus
from megagpt.config import Data
from megagpt.data import order, pack
from megagpt.data.corpus import open_corpus
from megagpt.data.loader import train_batches
from megagpt.files import write_whole
from tests.data.stores import Faults, proxy, s3_server, upload, use_server

LATENCY, BYTES_PER_S, STEP_SECONDS = 0.02, 100e6, 0.25


def waits(cache: Path, mode: str, *, steps: int, rows: int) -> list[float]:
    """Seconds that each step waited for its batch; that of the first counts from the opening of the corpus."""
    began = time.perf_counter()
    corpus = open_corpus("s3://bucket/corpus", Data(cache=str(cache), remote=mode))  # type: ignore[arg-type]
    source = pack.source(corpus, context=CONTEXT, packing="chunk")
    batches = train_batches(
        [corpus],
        order.start(seed=1, context=CONTEXT, packing="chunk", weights={source: 1}),
        global_batch=lambda _consumed: rows,
        micro_batch=rows,
        data_rank=0,
        data_ranks=1,
        document_mask=True,
        pin=False,
        prefetch=4,
    )
    found = []
    with batches:
        for _ in range(steps):
            next(batches)
            found.append(time.perf_counter() - began)
            time.sleep(STEP_SECONDS)
            began = time.perf_counter()
    return found


def measure(folder: Path, *, tokens: int, steps: int, rows: int) -> dict[str, dict[str, float]]:
    results = {}
    with s3_server() as port, pytest.MonkeyPatch.context() as patch:
        write_corpus(folder / "corpus", tokens, 1)
        upload(port, folder / "corpus", "bucket", "corpus")
        for mode in ("blocks", "shards"):
            faults = Faults(latency=LATENCY, bytes_per_s=BYTES_PER_S)
            with proxy(port, faults) as endpoint:
                use_server(patch, endpoint)
                first, *later = waits(folder / mode, mode, steps=steps, rows=rows)
            results[mode] = {
                "first_step_s": round(first, 2),
                "data_wait_percent_of_later_steps": round(100 * sum(later) / (len(later) * STEP_SECONDS), 3),
                "longest_wait_ms": round(1000 * max(later), 1),
                "requests": faults.requests,
            }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=32, help="rows of 2,048 tokens in a step")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), tokens=options.tokens, steps=options.steps, rows=options.rows)
    print(json.dumps(results, indent=1))
    if options.out:
        arguments = f"--tokens {options.tokens} --steps {options.steps} --rows {options.rows}"
        result = {
            "command": f"PYTHONPATH=. python benchmarks/remote.py {arguments}",
            "date": time.strftime("%Y-%m-%d"),
            "hardware": f"{os.cpu_count()} cores {platform.machine()}, no GPU, load {os.getloadavg()[0]:.1f}",
            "versions": {"python": platform.python_version(), "numpy": np.__version__, "fsspec": fsspec.__version__},
            "line": {"latency_ms": 1000 * LATENCY, "mb_per_s": BYTES_PER_S / 1e6, "step_ms": 1000 * STEP_SECONDS},
            **results,
        }
        write_whole(options.out, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
