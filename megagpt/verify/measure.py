"""What one rank of a layout computes and holds, written down for the comparison: safetensors and json, no pickle.

rank-3.json           losses, norms, place in the grid, and for each stored tensor what it is
rank-3.safetensors    activations of the first micro-batch; gradients owned; weights and moments held
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from megagpt.checkpoint.boxes import Box
from megagpt.config import Run
from megagpt.mesh import mesh_of
from megagpt.parallel import ranks
from megagpt.parallel.engine import Engine
from megagpt.verify import faults, task
from megagpt.verify.reference import watch, watched


def measure(run: Run, folder: Path, fault: str | None) -> None:
    """Three steps of `run` on this rank; what they gave goes to `folder`. Every rank must call it."""
    ranks.join(world=run.parallel.world_size())
    mesh = mesh_of(run.parallel, ranks.rank())
    if fault is not None:
        faults.plant(fault, mesh)
    engine = Engine(run, mesh)
    _start(engine, run)
    notes = _Notes()
    activations: dict[str, Tensor] = {}
    hooks = [watch(name, module, activations) for name, module in engine.named_modules() if watched(name)]
    losses, norms = [], []
    share = task.ROWS // mesh.data
    for step in range(task.STEPS):
        starts = range(mesh.data_rank * share, (mesh.data_rank + 1) * share, run.train.micro_batch)
        batches = [task.rows(run, step, start, run.train.micro_batch) for start in starts]
        observe = notes.gradients if step == 0 else None
        done = engine.train_batch(
            batches if mesh.reads_data else [], lr=run.optim.lr, count=len(batches), observe=observe
        )
        for hook in hooks:
            hook.remove()
        losses.append(done.loss)
        norms.append(done.grad_norm)
    for name, value in activations.items():
        notes.add("activation", name, value)
    for part in engine.held():
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            notes.add(kind, part.name, getattr(part, kind), box=part.box)
    notes.write(folder, {"losses": losses, "norms": norms, "mesh": asdict(mesh)})


def _start(engine: Engine, run: Run) -> None:
    """Every rank begins with the task's weights, through the door by which a checkpoint comes in."""
    for part in engine.held():
        part.weight.copy_(task.weight(part.name, part.shape, run.seed)[part.box.slices()])
    engine.restored({"optimizer_steps": 0, "loss_scaler": {}})


class _Notes:
    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._index: list[dict[str, Any]] = []

    def add(self, kind: str, name: str, value: Tensor, *, box: Box | None = None) -> None:
        key = str(len(self._index))
        self._tensors[key] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
        place = {} if box is None else {"start": box.start, "size": box.size}
        self._index.append({"key": key, "kind": kind, "name": name, **place})

    def gradients(self, found: list[tuple[str, Box, Tensor]]) -> None:
        for name, box, value in found:
            self.add("gradient", name, value, box=box)

    def write(self, folder: Path, header: dict[str, Any]) -> None:
        path = folder / f"rank-{ranks.rank()}.json"
        safetensors.torch.save_file(self._tensors, path.with_suffix(".safetensors"))
        path.write_text(json.dumps({**header, "tensors": self._index}), encoding="utf-8")
