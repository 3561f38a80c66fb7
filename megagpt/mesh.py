"""The rank grid: world = data x pipeline x tensor, as one reshaped arange.

    ranks = arange(world).reshape(data, pipeline, tensor)        e.g. 2 x 2 x 2:   [[[0 1] [2 3]] [[4 5] [6 7]]]

Tensor ranks are neighbours, so that they sit inside one node; data-parallel replicas are farthest apart, since they
talk once a step. Nothing else in the project derives one rank number from another.
"""

from __future__ import annotations

from dataclasses import dataclass

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
