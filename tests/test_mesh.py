from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.config import Parallel
from megagpt.mesh import grid, lines, mesh_of

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


@given(sizes, sizes, sizes, st.sampled_from(["data", "pipeline", "tensor", "replica"]))
def test_every_rank_is_in_one_group_of_each_axis_with_ranks_that_differ_there_alone(data, pipeline, tensor, axis):
    parallel = Parallel(data=data, pipeline=pipeline, tensor=tensor)
    groups = lines(parallel, axis)
    assert sorted(rank for group in groups for rank in group) == list(range(parallel.world_size()))
    kept = {"data": ("pipeline", "tensor"), "pipeline": ("data", "tensor"), "tensor": ("data", "pipeline")}
    for group in groups:
        meshes = [mesh_of(parallel, rank) for rank in group]
        places = {tuple(getattr(m, f"{other}_rank") for other in kept.get(axis, ("data",))) for m in meshes}
        assert len(places) == 1


@given(sizes, sizes, sizes)
def test_the_ends_are_the_first_and_last_stage_of_each_pipeline(data, pipeline, tensor):
    parallel = Parallel(data=data, pipeline=pipeline, tensor=tensor)
    found = lines(parallel, "ends")
    assert len(found) == data * tensor
    for group in found:
        stages = [mesh_of(parallel, rank).pipeline_rank for rank in group]
        assert stages == ([0, pipeline - 1] if pipeline > 1 else [0])


def test_one_rank_of_each_replica_reports_and_only_the_ends_read_data():
    meshes = [mesh_of(Parallel(data=2, pipeline=3, tensor=2), rank) for rank in range(12)]
    assert [mesh.rank for mesh in meshes if mesh.reports] == [4, 10]
    assert [mesh.pipeline_rank for mesh in meshes if not mesh.reads_data] == [1, 1, 1, 1]
    assert meshes[9].describe() == "rank 9 (data 1, stage 1, tensor 1)"
