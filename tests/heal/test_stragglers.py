"""Who is slow, from the times of all ranks."""

from __future__ import annotations

from megagpt.config import Parallel
from megagpt.heal.stragglers import stragglers
from megagpt.mesh import mesh_of


def test_a_rank_is_compared_with_the_ranks_of_its_own_stage():
    mesh = mesh_of(Parallel(data=4, pipeline=2), 0)
    stage = [mesh_of(Parallel(data=4, pipeline=2), rank).pipeline_rank for rank in range(8)]
    usual = [0.1 + 0.3 * at for at in stage]
    assert stragglers(usual, mesh, 1.3) == []
    slow = [seconds * (1.5 if rank == 6 else 1.0) for rank, seconds in enumerate(usual)]
    assert [(found.rank, round(found.score, 3)) for found in stragglers(slow, mesh, 1.3)] == [(6, 1.5)]


def test_of_two_ranks_the_slower_one_is_named_and_noise_is_not():
    mesh = mesh_of(Parallel(data=2), 0)
    assert [found.rank for found in stragglers([0.2, 0.1], mesh, 1.3)] == [0]
    assert stragglers([2e-5, 1e-5], mesh, 1.3) == []
