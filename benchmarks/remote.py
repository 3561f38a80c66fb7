"""The wait for data of a run that reads its corpus from an S3 server 20 ms away over a line of 100 MB/s.

moto's server on this machine, behind the tests' proxy, which makes every request wait 20 ms and shares 100 MB/s among
all connections; server and proxy are processes of their own, as they are in life. A step is a sleep of 250 ms; the
cache is empty at the beginning. The first step, which has nothing fetched ahead, is told apart. Beside it a plain
client (boto3, as many threads as the loader has) asks for as much through the same line: its requests a second, over
those that a step needs, say how much of the test is the test's own server.

    PYTHONPATH=. python benchmarks/remote.py [--steps 60] [--rows 32] [--out benchmarks/results/remote.json]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import fsspec
import numpy as np
import pytest
import torch
from botocore.config import Config

from benchmarks.data import CONTEXT, write_corpus
from megagpt.config import Data
from megagpt.data import order, pack
from megagpt.data.corpus import open_corpus
from megagpt.data.fetch import THREADS
from megagpt.data.loader import train_batches
from megagpt.data.shards import BLOCK_TOKENS
from megagpt.files import write_whole
from tests.data.stores import s3_server, upload, use_server

LATENCY, BYTES_PER_S, STEP_SECONDS = 0.02, 100e6, 0.25
_BLOCK_BYTES = 2 * BLOCK_TOKENS
_PROXY = """
import sys
from tests.data.stores import Faults, proxy
faults = Faults(latency=float(sys.argv[2]), bytes_per_s=float(sys.argv[3]))
with proxy(int(sys.argv[1]), faults) as endpoint:
    print(endpoint, flush=True)
    for _ in sys.stdin:
        print(faults.requests, flush=True)
"""


class Line:
    """A slow line to the server at a port. Made by `open_line`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.endpoint = self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def requests(self) -> int:
        """Requests that have passed so far."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return int(self._answer())


@contextlib.contextmanager
def open_line(port: int) -> Iterator[Line]:
    command = [sys.executable, "-c", _PROXY, str(port), str(LATENCY), str(BYTES_PER_S)]
    with subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Line(process)
        process.communicate()


def waits(cache: Path, mode: str, *, steps: int, rows: int) -> Iterator[float]:
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
    with batches:
        for _ in range(steps):
            next(batches)
            yield time.perf_counter() - began
            time.sleep(STEP_SECONDS)
            began = time.perf_counter()


def plain_client(endpoint: str, folder: Path, requests: int) -> float:
    """Requests a second of boto3 on threads, each for as many bytes as a block has, from random places."""
    client = boto3.client("s3", endpoint_url=endpoint, config=Config(max_pool_connections=THREADS))
    tars = sorted(folder.glob("*.tar"))
    generator = np.random.default_rng(0)
    places = [
        (tars[k].name, int(generator.integers(0, tars[k].stat().st_size - _BLOCK_BYTES)))
        for k in generator.integers(0, len(tars), requests).tolist()
    ]

    def get(place: tuple[str, int]) -> None:
        name, start = place
        span = f"bytes={start}-{start + _BLOCK_BYTES - 1}"
        content = client.get_object(Bucket="bucket", Key=f"corpus/{name}", Range=span)["Body"].read()
        assert len(content) == _BLOCK_BYTES

    get(places[0])
    with ThreadPoolExecutor(THREADS) as threads:
        began = time.perf_counter()
        list(threads.map(get, places))
        return requests / (time.perf_counter() - began)


def measure(folder: Path, *, tokens: int, steps: int, rows: int) -> dict[str, dict[str, float]]:
    results: dict[str, dict[str, float]] = {}
    with s3_server() as port, pytest.MonkeyPatch.context() as patch:
        write_corpus(folder / "corpus", tokens, 1)
        upload(port, folder / "corpus", "bucket", "corpus")
        with open_line(port) as line:
            use_server(patch, line.endpoint)
            found = plain_client(line.endpoint, folder / "corpus", 16 * rows)
            over = found * STEP_SECONDS / rows
            results["plain client"] = {"requests_per_s": round(found, 1), "over_what_blocks_need": round(over, 2)}
            for mode in ("blocks", "shards"):
                before, cpu = line.requests(), time.process_time()
                first, *later = waits(folder / mode, mode, steps=steps, rows=rows)
                results[mode] = {
                    "first_step_s": round(first, 2),
                    "data_wait_percent_of_later_steps": round(100 * sum(later) / (len(later) * STEP_SECONDS), 3),
                    "longest_wait_ms": round(1000 * max(later), 1),
                    "requests": line.requests() - before,
                    "cpu_ms_a_step": round(1000 * (time.process_time() - cpu) / steps, 1),
                }
                gc.collect()  # what was asked for ahead is not fetched any more
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
