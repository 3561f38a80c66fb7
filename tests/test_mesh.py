from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.config import Parallel
from megagpt.mesh import grid, mesh_of

sizes = st.integers(1, 5)


def test_tensor_ranks_are_neighbours_and_data_ranks_are_farthest_apart():
    assert grid(Parallel(data=2, pipeline=2, tensor=2)).tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


@given(sizes, sizes, sizes)
def test_every_rank_has_one_place_and_every_place_one_rank(data, pipeline, tensor):
    parallel = Parallel(data=data, pipeline=pipeline, tensor=tensor)
    meshes = [mesh_of(parallel, rank) for rank in range(parallel.world_size())]
    assert [mesh.rank for mesh in meshes] == list(range(data * pipeline * tensor))
    assert len({(mesh.data_rank, mesh.pipeline_rank, mesh.tensor_rank) for mesh in meshes}) == len(meshes)


def test_a_rank_outside_the_grid_is_refused():
    with pytest.raises(ValueError, match="rank 8 is outside a grid of 8 ranks"):
        mesh_of(Parallel(data=8), 8)
