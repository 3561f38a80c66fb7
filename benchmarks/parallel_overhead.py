"""What tensor, pipeline and data parallelism cost over the bare arithmetic, on two local ranks at equal work.

Every layout trains the same global batch of the same model. The yardstick is plain torch: two processes at the same
time, each forward, backward and AdamW on half of the rows, without a word between them. Of a layout's step

    waiting     time blocked in collectives, measured on every call (the largest of the ranks; a pipeline's bubble is
                time blocked in a receive, so it is in here)
    engine      the rest over the yardstick: DeepSpeed's and our own work between kernels, and slower, smaller products

and the model of the waiting is

    traffic     the formula's bytes (parallel/traffic.py, equal to what is counted) over the bandwidth that an
                all-reduce of such a size (x_BTD, or the gradient) reaches between these two ranks
    bubble      (p - 1) / (m + p - 1) of a step of p stages and m micro-batches
    imbalance   the largest stage's FLOPs over the mean, of a pipeline

    python benchmarks/parallel_overhead.py [--steps 6] [--out parallel_overhead.json]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megagpt.config import Model, Parallel, Run, Train
from megagpt.data.batch import Batch
from megagpt.ledger import layer_flops, parameters
from megagpt.mesh import mesh_of
from megagpt.model import build, initialise
from megagpt.parallel import ranks
from megagpt.parallel.engine import Engine
from megagpt.parallel.pipeline import stage_bounds
from megagpt.parallel.traffic import expected

MODEL = Model(layers=4, width=192, heads=6, vocabulary=4_096, context=128)
BATCH = 16
LAYOUTS = {
    "data 2": (Parallel(data=2, zero_stage=0), 4),
    "data 2, ZeRO 1": (Parallel(data=2, zero_stage=1), 4),
    "tensor 2": (Parallel(tensor=2, zero_stage=0), 4),
    "pipeline 2": (Parallel(pipeline=2, zero_stage=0), 4),
    "pipeline 2, 8 micro-batches": (Parallel(pipeline=2, zero_stage=0), 2),
}
"""Layout, and sequences of a micro-batch."""
BLOCKING = ("all_reduce", "broadcast", "send", "recv", "all_gather_into_tensor", "reduce_scatter_tensor", "barrier")


def rows(step: int, first: int, count: int) -> Batch:
    """Random rows, the same in every layout."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, MODEL.vocabulary, (BATCH, MODEL.context + 1), generator=generator)[first : first + count]
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None, torch.arange(first, first + count))


class _TimedWork:
    """An asynchronous collective, of which the wait is timed."""

    def __init__(self, work: Any, add: Callable[[float], None]) -> None:
        self._work, self._add = work, add

    def wait(self, *arguments: Any) -> Any:
        began = time.perf_counter()
        result = self._work.wait(*arguments)
        self._add(time.perf_counter() - began)
        return result


@contextlib.contextmanager
def waiting() -> Iterator[list[float]]:
    """Seconds blocked in torch.distributed's calls, one entry a call, while it is entered."""
    found: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments, **options)
            found.append(time.perf_counter() - began)
            return _TimedWork(result, found.append) if hasattr(result, "wait") else result

        return call

    originals = {name: getattr(dist, name) for name in BLOCKING}
    for name, function in originals.items():
        setattr(dist, name, timed(function))
    try:
        yield found
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


def plain_steps(steps: int) -> list[float]:
    """Seconds of each step of half the batch in plain torch, beside another rank that does the same."""
    gpt = build(MODEL, seed=1)
    initialise(gpt, MODEL, seed=1)
    adamw = torch.optim.AdamW(gpt.parameters(), fused=True)
    found = []
    for step in range(steps):
        dist.barrier()
        began = time.perf_counter()
        for first in range(0, BATCH // 2, 4):
            (gpt(rows(step, first, 4)) / (BATCH * MODEL.context)).backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        found.append(time.perf_counter() - began)
    return found


def layout_steps(parallel: Parallel, micro_batch: int, steps: int) -> dict[str, Any]:
    """Seconds of each step of a layout, of them blocked, and its bytes by the formula."""
    run = Run(
        model=MODEL, parallel=parallel, train=Train(global_batch=BATCH, micro_batch=micro_batch, precision="fp32")
    )
    mesh = mesh_of(parallel, ranks.rank())
    engine = Engine(run, mesh)
    share = BATCH // mesh.data
    seconds, blocked = [], []
    for step in range(steps):
        starts = range(mesh.data_rank * share, (mesh.data_rank + 1) * share, micro_batch)
        batches = [rows(step, first, micro_batch) for first in starts]
        dist.barrier()
        began = time.perf_counter()
        with waiting() as found:
            engine.train_batch(batches, lr=1e-4)
        seconds.append(time.perf_counter() - began)
        blocked.append(sum(found))
    numbers = sum(part.parameter.numel() for part in engine.placed)
    counts = expected(run, mesh, numbers)
    carried = sum(size * (1 if operation == "all-reduce" else 0.5) for (_, operation), size in counts.items())
    return {"seconds": seconds, "blocked": blocked, "carried": carried}


def bandwidth(elements: int) -> float:
    """Bytes a second of payload that an all-reduce of so many fp32 numbers reaches."""
    x, times = torch.ones(elements), []
    for _ in range(15):
        began = time.perf_counter()
        dist.all_reduce(x)
        times.append(time.perf_counter() - began)
    return elements * 4 / statistics.median(times[5:])


def measured(steps: int, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Of each layout, what both ranks measured; layouts alternate, and the first step of each round is left out."""
    everything: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _, (label, (parallel, micro_batch)) in itertools.product(
            range(rounds), {"plain torch": (Parallel(data=2), 4), **LAYOUTS}.items()
        ):

            def work(label: str = label, parallel: Parallel = parallel, micro_batch: int = micro_batch) -> None:
                ranks.join(world=2)
                torch.set_num_threads(1)
                if label == "plain torch":
                    found: dict[str, Any] = {
                        "seconds": plain_steps(steps),
                        "activations": bandwidth(4 * MODEL.context * MODEL.width),
                        "gradients": bandwidth(parameters(MODEL).total()),
                    }
                else:
                    found = layout_steps(parallel, micro_batch, steps)
                (folder / f"{ranks.rank()}.json").write_text(json.dumps(found), encoding="utf-8")

            if ranks.run_local(work, 2):
                raise SystemExit(f"{label}: a rank failed")
            both = [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
            everything.setdefault(label, []).append({key: [one[key] for one in both] for key in both[0]})
    return everything


def fastest(found: list[dict[str, Any]], key: str) -> float:
    """The larger rank's value in the fastest step after each round's first: the one least disturbed by other work."""
    steps = [
        (max(seconds), max(values))
        for part in found
        for seconds, values in list(
            zip(zip(*part["seconds"], strict=True), zip(*part[key], strict=True), strict=True)
        )[1:]
    ]
    return min(steps)[1]


def bubble(parallel: Parallel, micro_batch: int) -> tuple[float, float]:
    """Of a pipeline: the idle share of a step, and the largest stage's FLOPs over the mean, less 1."""
    stages, micro_batches = parallel.pipeline, BATCH // (micro_batch * parallel.data)
    bounds, costs = stage_bounds(MODEL, stages), layer_flops(MODEL)
    sums = [sum(costs[first:stop]) for first, stop in itertools.pairwise(bounds)]
    return (stages - 1) / (micro_batches + stages - 1), max(sums) * stages / sum(sums) - 1


def report(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The table, in seconds a step."""
    plain = fastest(found["plain torch"], "seconds")
    rates = {kind: max(min(part[kind]) for part in found["plain torch"]) for kind in ("activations", "gradients")}
    results: dict[str, Any] = {
        "plain torch": {"seconds": round(plain, 4)},
        "all-reduce": {f"{kind}_mb_per_s": round(rate / 1e6) for kind, rate in rates.items()},
    }
    for label, (parallel, micro_batch) in LAYOUTS.items():
        seconds, blocked = fastest(found[label], "seconds"), fastest(found[label], "blocked")
        idle, imbalance = bubble(parallel, micro_batch)
        carried = max(found[label][0]["carried"]) / rates["gradients" if parallel.data > 1 else "activations"]
        results[label] = {
            "seconds": round(seconds, 4),
            "over_plain": round(seconds / plain, 3),
            "waiting": round(blocked, 4),
            "model_traffic": round(carried, 4),
            "model_bubble": round(plain * idle / (1 - idle), 4),
            "model_imbalance": round(plain * imbalance, 4),
            "engine": round(seconds - blocked - plain, 4),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="steps of a layout in each round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, in which the layouts alternate")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = report(measured(options.steps, options.rounds))
    for label, values in results.items():
        print(f"{label:28}", values)
    if options.out:
        result = {
            "command": f"python benchmarks/parallel_overhead.py --steps {options.steps} --rounds {options.rounds}",
            "date": time.strftime("%Y-%m-%d"),
            "hardware": f"{os.cpu_count()} cores {platform.machine()}, no GPU, gloo",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "model": dataclasses.asdict(MODEL),
            "batch": BATCH,
            "seconds_a_step": results,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
