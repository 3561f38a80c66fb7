"""The rank grid: world = data x pipeline x tensor, as one reshaped arange.

    ranks = arange(world).reshape(data, pipeline, tensor)        e.g. 2 x 2 x 2:   [[[0 1] [2 3]] [[4 5] [6 7]]]

Tensor ranks are neighbours, so that they sit inside one node; data-parallel replicas are farthest apart, since they
talk once a step. Nothing else in the project derives one rank number from another; DeepSpeed gets the same grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megagpt.config import Parallel


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Where one rank stands in the grid."""

    data: int
    """Data-parallel replicas, and so on: the sizes of the axes."""
    pipeline: int
    tensor: int
    data_rank: int
    """This rank's place on the data axis, and so on."""
    pipeline_rank: int
    tensor_rank: int

    @property
    def world_size(self) -> int:
        return self.data * self.pipeline * self.tensor

    @property
    def rank(self) -> int:
        """The global rank."""
        return int(grid(self)[self.data_rank, self.pipeline_rank, self.tensor_rank])

    @property
    def first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline - 1

    @property
    def reads_data(self) -> bool:
        """Whether this rank needs batches: the first stage their tokens, the last their targets."""
        return self.first_stage or self.last_stage

    @property
    def reports(self) -> bool:
        """Whether this rank speaks for its replica where each replica must count once: of the tensor ranks of the
        last stage, which all know the loss, the first.
        """
        return self.last_stage and self.tensor_rank == 0

    def describe(self) -> str:
        """For messages: rank 5 (data 1, stage 0, tensor 1)."""
        return f"rank {self.rank} (data {self.data_rank}, stage {self.pipeline_rank}, tensor {self.tensor_rank})"


def grid(sizes: Parallel | Mesh) -> np.ndarray:
    """Global ranks, [data, pipeline, tensor]."""
    shape = (sizes.data, sizes.pipeline, sizes.tensor)
    return np.arange(np.prod(shape)).reshape(shape)


def mesh_of(parallel: Parallel, rank: int) -> Mesh:
    """The place of global rank `rank`. Raises ValueError if the grid has no such rank."""
    if not 0 <= rank < parallel.world_size():
        raise ValueError(f"rank {rank} is outside a grid of {parallel.world_size()} ranks")
    data_rank, pipeline_rank, tensor_rank = (int(place[0]) for place in np.where(grid(parallel) == rank))
    return Mesh(
        data=parallel.data,
        pipeline=parallel.pipeline,
        tensor=parallel.tensor,
        data_rank=data_rank,
        pipeline_rank=pipeline_rank,
        tensor_rank=tensor_rank,
    )


def mesh_like(mesh: Mesh, rank: int) -> Mesh:
    """The place of another rank of the same grid."""
    return mesh_of(Parallel(data=mesh.data, pipeline=mesh.pipeline, tensor=mesh.tensor), rank)


@dataclass(frozen=True)
class Groups:
    """The process groups that one rank belongs to, one an axis, and two more."""

    tensor: Any
    """Ranks that share each matrix product: same replica, same stage."""
    pipeline: Any
    """The stages of one replica, with the same part of each matrix."""
    data: Any
    """The replicas: ranks that hold the same part of the model."""
    replica: Any
    """All ranks of one replica."""
    ends: Any
    """First and last stage of one pipeline, who share a tied embedding; None on the stages between them."""


def lines(sizes: Parallel | Mesh, axis: str) -> list[list[int]]:
    """The ranks of each group of `axis`: data, pipeline, tensor, replica, or ends. Every rank is in at most one."""
    ranks = grid(sizes)
    if axis == "replica":
        return ranks.reshape(sizes.data, -1).tolist()
    if axis == "ends":
        both = ranks[:, [0, -1], :] if sizes.pipeline > 1 else ranks
        return np.moveaxis(both, 1, -1).reshape(-1, both.shape[1]).tolist()
    place = ("data", "pipeline", "tensor").index(axis)
    return np.moveaxis(ranks, place, -1).reshape(-1, ranks.shape[place]).tolist()


def groups_of(mesh: Mesh) -> Groups:
    """Make all process groups of the grid; every rank must call it, since every rank takes part in making each."""
    names = ("tensor", "pipeline", "data", "replica", "ends")
    return Groups(**{name: _own_group(lines(mesh, name), mesh.rank) for name in names})


def _own_group(parts: Sequence[Sequence[int]], rank: int) -> Any:
    import torch.distributed as dist

    own = None
    for ranks in parts:
        group = dist.new_group(list(ranks))
        if rank in ranks:
            own = group
    return own
