"""What every system of train_step.py is given, and how it answers. It runs in all environments: torch is all it needs.

A worker says {"parameters", "versions"} once it is warm, then one {"seconds", "loss"} for each line it reads. The
others wait without using the CPU, so that rounds can alternate within one run.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Task:
    """GPT-2's architecture at some size, and the work of one round."""

    layers: int = 6
    width: int = 384
    heads: int = 6
    context: int = 256
    vocabulary: int = 50_257
    batch: int = 8
    """Sequences of a step."""
    steps: int = 2
    """Steps of a round."""
    warmup: int = 2
    """Steps before the first round."""
    threads: int = 1
    lr: float = 6e-4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0


def read_task() -> Task:
    """The task on the command line; sets torch's threads, before anything runs."""
    values = json.loads(sys.argv[1])
    task = Task(**{**values, "betas": tuple(values["betas"])})
    torch.set_num_threads(task.threads)
    return task


def rows(task: Task) -> Iterator[Tensor]:
    """Batches of context + 1 random tokens, the same for every system: what they are does not change the speed."""
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randint(task.vocabulary, (task.batch, task.context + 1), generator=generator)


class Channel:
    """Lines of JSON to the benchmark on what was stdout; anything printed goes to stderr instead."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def tell(self, message: dict[str, Any]) -> None:
        print(json.dumps(message), file=self._out, flush=True)

    def asked(self) -> bool:
        """Wait for the next round; False if there is none."""
        return bool(sys.stdin.readline())


def versions(*packages: str) -> dict[str, str]:
    return {package: metadata.version(package) for package in packages}


def serve(task: Task, step: Callable[[Tensor], float], *, parameters: int, packages: tuple[str, ...]) -> None:
    """Answer rounds of `step`, which trains on [batch, context + 1] tokens and returns the loss in nats a token."""
    channel, batches = Channel(), rows(task)
    for _ in range(task.warmup):
        step(next(batches))
    channel.tell({"parameters": parameters, "versions": versions(*packages)})
    while channel.asked():
        begin, loss = time.perf_counter(), 0.0
        for _ in range(task.steps):
            loss = step(next(batches))
        channel.tell({"seconds": time.perf_counter() - begin, "loss": loss})
