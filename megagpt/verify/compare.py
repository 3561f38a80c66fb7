"""A layout's outcome against the fp64 truth: which tensor differs first, by how much, on which rank.

The error of a tensor is ||found - true|| / ||true|| (Frobenius). Its bound has the form k C^d u that Megatron-LM's
test of gradients across layouts takes from arXiv:2506.09280, theorem 5.3: each layer multiplies the error that comes
in by at most a constant and adds its own, u = 2^-24 being fp32's unit roundoff. With k = 8, C = 2:

    activation of layer d (from 0)       k C^(d + 1) u
    gradient of layer d of L + 2         k C^(L + 2) u (2 - d / (L + 2))       through all layers, and back to d
    moments, after three steps           twice that: Adam's quotient is harmless where its eps is large
    weights, after three steps           k (L + 2) u: steps move them by a small share of themselves
    loss; gradient norm                  2 k (L + 2) u; twice that after the first step

docs/parallel.md shows the errors measured: a quarter of the bound at most, while the faults are off by 1e-3 and more.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from megagpt.checkpoint import boxes
from megagpt.checkpoint.boxes import Box
from megagpt.config import Run
from megagpt.mesh import Mesh
from megagpt.parallel.cut import CUTS, Place
from megagpt.verify import task
from megagpt.verify.reference import Outcome

UNIT = 2.0**-24
K, C = 8, 2.0
LATER = 2.0  # for what comes of three steps rather than one


@dataclass(frozen=True)
class RankPart:
    """What one rank has of one tensor of the whole model, and the truth about the same elements."""

    kind: str
    name: str
    mesh: Mesh
    found: Tensor
    true: Tensor
    box: Box

    def difference(self) -> float:
        return float((self.found.double() - self.true).norm())


@dataclass(frozen=True)
class Finding:
    """One tensor of one kind, over all ranks."""

    kind: str
    """activation, gradient, weight, exp_avg, exp_avg_sq, loss, or norm."""
    name: str
    error: float
    bound: float
    parts: tuple[RankPart, ...]
    note: str = ""

    def differs(self) -> bool:
        return not self.error <= self.bound  # a NaN differs

    def worst(self) -> RankPart | None:
        """The part that is farthest off, by its own norm."""
        return max(self.parts, key=lambda part: part.difference() / (float(part.true.norm()) + 1e-30), default=None)


def findings(run: Run, truth: Outcome, folder: Path) -> list[Finding]:
    """Every comparison of a layout: the first step in forward order, then what the three steps led to."""
    notes = [_read(folder / f"rank-{rank}.json") for rank in range(run.parallel.world_size())]
    parts = [part for header, tensors in notes for part in _parts(run, truth, header, tensors)]
    losses = _scalars("loss", truth.losses, [header["losses"] for header, _ in notes], run)
    norms = _scalars("norm", truth.norms, [header["norms"] for header, _ in notes], run)
    found = [_finding(run, "activation", name, parts, value) for name, value in truth.activations.items()]
    found += losses[:1]
    found += [_finding(run, "gradient", name, parts, value) for name, value in truth.gradients.items()]
    found += norms[:1]
    for kind, whole in _state(truth).items():
        found += [_finding(run, kind, name, parts, value) for name, value in whole.items()]
    return found + losses[1:] + norms[1:]


def _state(truth: Outcome) -> dict[str, dict[str, Tensor]]:
    return {"weight": truth.weights, "exp_avg": truth.exp_avg, "exp_avg_sq": truth.exp_avg_sq}


def bound(run: Run, kind: str, name: str) -> float:
    """The largest error that rounding explains."""
    layers = run.model.layers + 2
    layer = _layer_of(name, layers)
    if kind == "activation":
        return K * C ** (layer + 1) * UNIT
    if kind in ("loss", "norm", "weight"):
        return K * layers * UNIT * (1 if kind == "weight" else 2)
    return K * C**layers * (2 - layer / layers) * UNIT * (1 if kind == "gradient" else LATER)


def _layer_of(name: str, layers: int) -> int:
    if name.startswith("blocks."):
        return 1 + int(name.split(".")[1])
    return 0 if name.startswith("embedding") else layers - 1


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads(path.read_text(encoding="utf-8")), safetensors.torch.load_file(path.with_suffix(".safetensors"))


def _parts(run: Run, truth: Outcome, header: dict[str, Any], tensors: dict[str, Tensor]) -> list[RankPart]:
    mesh = Mesh(**header["mesh"])
    parts = []
    for item in header["tensors"]:
        kind, name, found = item["kind"], item["name"], tensors[item["key"]]
        if kind == "activation":
            true, box = _activation(run, mesh, name, truth.activations[name])
        else:
            whole = truth.gradients[name] if kind == "gradient" else _state(truth)[kind][name]
            box = Box(tuple(item["start"]), tuple(item["size"]))
            true = whole[box.slices()]
        parts.append(RankPart(kind, name, mesh, found.reshape(true.shape), true, box))
    return parts


def _activation(run: Run, mesh: Mesh, name: str, whole: Tensor) -> tuple[Tensor, Box]:
    """What this rank should see of a module's output in its first micro-batch, and where that is (of cut features: the
    first range).
    """
    if whole.shape[0] == task.ROWS and whole.dim() > 2:
        first = mesh.data_rank * (task.ROWS // mesh.data)
        whole = whole[first : first + run.train.micro_batch]
    start = [0] * whole.dim()
    rule = CUTS.get(".".join(name.split(".")[-2:]))
    place = Place(mesh.tensor_rank, mesh.tensor)
    if rule is not None and not name.endswith(("token", "attention.output", "down")):
        ranges = rule(run.model, place).ranges
        size = whole.shape[-1]
        pieces = [whole[..., part.start : min(part.stop, size)] for part in ranges]
        padding = sum(len(part) for part in ranges) - sum(piece.shape[-1] for piece in pieces)
        start[-1] = ranges[0].start
        return torch.nn.functional.pad(torch.cat(pieces, -1), (0, padding)), Box(tuple(start), tuple(whole.shape))
    if run.parallel.sequence_parallel and mesh.tensor > 1:
        share = whole.shape[-2] // mesh.tensor
        start[-2] = mesh.tensor_rank * share
        return whole[..., start[-2] : start[-2] + share, :], Box(tuple(start), tuple(whole.shape))
    return whole, Box(tuple(start), tuple(whole.shape))


def _finding(run: Run, kind: str, name: str, parts: list[RankPart], whole: Tensor) -> Finding:
    own = tuple(part for part in parts if (part.kind, part.name) == (kind, name))
    limit = bound(run, kind, name)
    if kind == "gradient":
        hole = boxes.fault_in_tiling(tuple(whole.shape), [part.box for part in own])
        if hole is not None:
            return Finding(kind, name, float("inf"), limit, own, note=hole)
    if not own:
        return Finding(kind, name, float("inf"), limit, own, note="no rank has it")
    scale = float(whole.norm()) if kind != "activation" else 0.0
    errors = [part.difference() / max(scale, float(part.true.norm()), 1e-30) for part in own]
    if kind == "gradient":
        errors = [sum(part.difference() ** 2 for part in own) ** 0.5 / max(scale, 1e-30)]
    worst = max(errors) if all(error == error for error in errors) else float("nan")
    return Finding(kind, name, worst, limit, own)


def _scalars(kind: str, true: list[float], found: list[list[float]], run: Run) -> list[Finding]:
    """A number a step, the same on every rank."""
    results = []
    for step, value in enumerate(true):
        errors = [abs(ranks[step] - value) / abs(value) for ranks in found]
        error = max(errors) if all(item == item for item in errors) else float("nan")
        shown = f"{found[errors.index(error)][step]:.8g} instead of {value:.8g}" if error == error else "not a number"
        limit = bound(run, kind, "") * (LATER if step else 1)
        results.append(Finding(kind, f"{kind} of step {step + 1}", error, limit, (), note=shown))
    return results
