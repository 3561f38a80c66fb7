"""Stragglers: ranks whose own time for a step is far above that of the ranks that do the same work.

    score = a rank's median own time / the median of it over its peers, the same stage's ranks in all replicas

A rank's own time is its wait for data and its model's forward passes, in which no data-parallel rank waits for another
under ZeRO 0 to 2. Tensor ranks do: a slow one shows as its whole group, usually a node. Under ZeRO 3 the forward waits
for weights of all ranks, and only a slow loader shows. A stage has no peers without replicas.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megagpt.mesh import Mesh, mesh_like
from megagpt.parallel.ranks import values_of_ranks

LEAST_SECONDS = 1e-3  # of own time: below it, a ratio is noise


@dataclass(frozen=True)
class Straggler:
    """A rank that is slow, and by how much."""

    rank: int
    score: float
    seconds: float


class OwnTimes:
    """A rank's own seconds of each step since the last comparison."""

    def __init__(self) -> None:
        self._seconds: list[float] = []

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def compare(self, mesh: Mesh, threshold: float) -> list[Straggler]:
        """The ranks that score above `threshold`, slowest first, the same on every rank. Every rank must call it."""
        own = statistics.median(self._seconds) if self._seconds else 0.0
        self._seconds.clear()
        return stragglers(values_of_ranks(own), mesh, threshold)


def stragglers(seconds: Sequence[float], mesh: Mesh, threshold: float) -> list[Straggler]:
    """Of the own seconds of every rank, those that score above `threshold`, slowest first."""
    stages: dict[int, list[int]] = {}
    for rank in range(len(seconds)):
        stages.setdefault(mesh_like(mesh, rank).pipeline_rank, []).append(rank)
    found = []
    for peers in stages.values():
        usual = statistics.median_low(seconds[peer] for peer in peers)
        slow = [peer for peer in peers if seconds[peer] >= LEAST_SECONDS and seconds[peer] > threshold * usual]
        found += [Straggler(rank, seconds[rank] / max(usual, LEAST_SECONDS), seconds[rank]) for rank in slow]
    return sorted(found, key=lambda item: -item.score)
