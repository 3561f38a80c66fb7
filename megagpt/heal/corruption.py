"""Silent corruption: a step computed twice must give the same bits, since nothing here depends on timing or chance.

The first pass takes no step, the second is the step itself. Each rank keeps checksums of every module's output, of the
gradients that it computed itself, and of the reduced ones that it owns. Where they differ tells who is at fault:
    an output       the earliest stage that has one, and there the ranks on which it came first: others pass it on
    own gradients   the latest stage that has some: earlier stages' backward comes after it
    reduced ones    a link or a reduction, seen by the ranks that own them
Tensor ranks go through the same modules in step, so the first output that differs is the faulty rank's. A fault that
repeats itself exactly is not found: for that, copies of weights are compared (parallel/guard.py). Cost: one more step,
reading every output and gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megagpt.data.batch import Batch
from megagpt.errors import RunFailure
from megagpt.mesh import Mesh, mesh_like
from megagpt.parallel.engine import Engine, Step
from megagpt.parallel.guard import checksum
from megagpt.parallel.ranks import values_of_ranks
from megagpt.parallel.state import Gradient

KINDS = ("output", "own gradient", "reduced gradient")


class Fingerprint:
    """Checksums of one pass on this rank, in the order in which they arose: of each kind, (name, sum)."""

    def __init__(self) -> None:
        self.sums: dict[str, list[tuple[str, Tensor]]] = {kind: [] for kind in KINDS}

    def add(self, kind: str, name: str, value: Any) -> None:
        for tensor in value if isinstance(value, tuple | list) else (value,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.sums[kind].append((name, checksum(tensor)))

    def add_reduced(self, gradients: Sequence[Gradient]) -> None:
        for name, _, gradient in gradients:
            self.add("reduced gradient", name, gradient)

    def difference(self, other: Fingerprint) -> dict[str, tuple[int, str]]:
        """Of each kind that differs, the first that does: its place among all that arose, and its name."""
        found = {}
        for kind in KINDS:
            names = [name for name, _ in self.sums[kind]]
            pairs = zip(self._values(kind), other._values(kind), strict=True)
            place = next((place for place, (one, two) in enumerate(pairs) if one != two), None)
            if place is not None:
                found[kind] = place, names[place]
        return found

    def _values(self, kind: str) -> list[int]:
        sums = [value for _, value in self.sums[kind]]
        return torch.stack(sums).tolist() if sums else []


@contextlib.contextmanager
def recorded(engine: Engine) -> Iterator[Fingerprint]:
    """The fingerprint of the pass that the block makes; pass its `add_reduced` as `observe`."""
    found = Fingerprint()
    with contextlib.ExitStack() as hooks:
        for name, module in engine.named_modules():
            hook = module.register_forward_hook(lambda _m, _i, out, name=name: found.add("output", name, out))
            hooks.callback(hook.remove)
        for part in engine.placed:
            hook = part.parameter.register_hook(lambda value, name=part.name: found.add("own gradient", name, value))
            hooks.callback(hook.remove)
        yield found


def train_twice(engine: Engine, micro_batches: Sequence[Batch], *, lr: float, count: int) -> Step:
    """`engine.train_batch`, after the same step without an update. Raises RunFailure if one bit of them differs."""
    with recorded(engine) as first:
        engine.rehearse(micro_batches, count=count, observe=first.add_reduced)
    with recorded(engine) as second:
        done = engine.train_batch(micro_batches, lr=lr, count=count, observe=second.add_reduced)
    refuse(first.difference(second), engine.mesh)
    return done


def refuse(difference: dict[str, tuple[int, str]], mesh: Mesh) -> None:
    """Raise RunFailure on every rank, with the ranks at fault, unless no rank found a difference."""
    places = {kind: values_of_ranks(difference[kind][0] if kind in difference else -1) for kind in KINDS}
    kind, suspects = accused(places, mesh)
    if not suspects:
        return
    here = f" Here, {mesh.describe()}, it was {difference[kind][1]}." if kind in difference else ""
    names = ", ".join(mesh_like(mesh, rank).describe() for rank in suspects)
    raise RunFailure(
        f"a step computed twice gave two results: the {kind} of {names} differs.{here}",
        "Continue from the last checkpoint, without the node of this rank; if it happens again, it is a bug.",
        cause="corruption",
        rank=suspects[0],
    )


def accused(places: Mapping[str, Sequence[float]], mesh: Mesh) -> tuple[str, list[int]]:
    """The kind of difference that tells most, and the ranks at fault.

    `places`: of each kind, where on every rank the first difference is; -1: nowhere.
    """
    for kind, place in places.items():
        ranks = [rank for rank, value in enumerate(place) if value >= 0]
        if not ranks:
            continue
        if kind == "reduced gradient":
            return kind, ranks
        stage = {rank: mesh_like(mesh, rank).pipeline_rank for rank in ranks}
        end = max(stage.values()) if kind == "own gradient" else min(stage.values())
        ranks = [rank for rank in ranks if stage[rank] == end]
        if kind == "output":
            first = min(place[rank] for rank in ranks)
            ranks = [rank for rank in ranks if place[rank] == first]
        return kind, ranks
    return "", []
