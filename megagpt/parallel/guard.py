"""The guard: every few steps, ranks that must read the same batch, or hold the same weights, prove that they do.

    batch      all ranks of a replica that read data: the tensor ranks of its first and last stage
    weights    data-parallel ranks, of every parameter (ZeRO 0-2); tensor ranks, of what is not cut; first and last
               stage, of a tied embedding

What is compared are 64-bit sums over the bits, weighted by place: a few bytes a parameter travel, and the weights are
read once. A silent disagreement, from a bad link, a faulty device or a bug, would otherwise train on for weeks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.data.batch import Batch
from megagpt.errors import RunFailure, UserError
from megagpt.mesh import Groups, Mesh, mesh_like
from megagpt.parallel.place import Placed
from megagpt.parallel.ranks import lowest_over_ranks

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> Tensor:
    """int64: of the bits of a tensor and where they are; it wraps around."""
    bits = tensor.detach().contiguous().view(_BITS[tensor.element_size()])
    table = bits.view(len(bits), -1) if bits.dim() > 1 and len(bits) else bits.view(1, -1)
    rows, columns = table.sum(1), table.sum(0)
    places = [torch.arange(1, len(sums) + 1, device=sums.device) for sums in (rows, columns)]
    return (rows * places[0]).sum() * 1_000_003 + (columns * places[1]).sum()


def check_batches(batches: Sequence[Batch], mesh: Mesh, device: torch.device) -> None:
    """Raise UserError on every rank, naming those that differ, unless each replica reads one batch."""
    own = torch.zeros((), dtype=torch.int64, device=device)
    for number, batch in enumerate(batches, start=1):
        for tensor in (batch.tokens_BT, batch.targets_BT, batch.samples_B, batch.cu_seqlens_S):
            if tensor is not None:
                own = own * 31 + number * checksum(tensor.to(device))
    table = _gathered(own, mesh)
    for replica in range(mesh.data):
        readers = [
            other
            for rank in range(mesh.world_size)
            if (other := mesh_like(mesh, rank)).reads_data and other.data_rank == replica
        ]
        for other in readers:
            if table[other.rank] != table[readers[0].rank]:
                raise UserError(
                    f"{other.describe()} reads another batch than {readers[0].describe()}, of the same replica.",
                    "Compare the corpora of the two machines with 'megagpt data verify'; they must be the same.",
                )


def check_weights(placed: Sequence[Placed], mesh: Mesh, groups: Groups, *, zero_stage: int, tied: bool) -> None:
    """Raise RunFailure on every rank, the first parameter named by one that sees it, unless all copies are equal."""
    problem = None
    if zero_stage < 3:
        problem = _difference(placed, groups.data, "data-parallel")
    uncut = [part for part in placed if part.cut is None]
    problem = _difference(uncut, groups.tensor, "tensor") or problem
    if tied and mesh.pipeline > 1:
        copies = [part for part in placed if part.name == "embedding.token.weight"]
        problem = _difference(copies, groups.ends, "first and last stage's") or problem
    seen = lowest_over_ranks(mesh.rank if problem else mesh.world_size)
    if seen < mesh.world_size:
        odd = lowest_over_ranks(problem[1] if problem else mesh.world_size)
        raise RunFailure(
            problem[0] if problem else f"copies of a weight differ, as rank {seen} found.",
            "Continue from a checkpoint, without the nodes of these ranks; if it happens again, it is a bug.",
            cause="corruption",
            rank=odd,
        )


def _difference(placed: Sequence[Placed], group: Any, kind: str) -> tuple[str, int] | None:
    """The first of these parameters whose copies on the group's ranks differ: in words, and the odd rank."""
    if not placed or dist.get_world_size(group) == 1:
        return None
    own = torch.stack([checksum(getattr(part.parameter, "ds_tensor", part.parameter)) for part in placed])
    copies = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(copies, own, group=group)
    for number, part in enumerate(placed):
        values = [int(copy[number]) for copy in copies]
        if len(set(values)) > 1:
            ranks = dist.get_process_group_ranks(group)
            common = max(values, key=values.count)
            odd = [rank for rank, value in zip(ranks, values, strict=True) if value != common]
            names = ", ".join(map(str, odd))
            words = f"{part.name} differs among the {kind} ranks {ranks}: rank {names} from the others."
            return words, odd[0]
    return None


def _gathered(value: Tensor, mesh: Mesh) -> list[int]:
    everyone = [torch.empty_like(value) for _ in range(mesh.world_size)]
    dist.all_gather(everyone, value)
    return [int(item) for item in everyone]
