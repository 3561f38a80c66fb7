"""The bytes that a step's collectives carry, counted as they run, are the formula's, to the byte."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megagpt import config
from megagpt.mesh import mesh_of
from megagpt.parallel import ranks
from megagpt.parallel.traffic import Traffic, expected
from megagpt.verify.layouts import EIGHT, SMALL, parse
from megagpt.verify.task import ROWS, rows, run_of
from tests.ranks import on_ranks


def counted(preset: str, layout: str, folder: Path, **model: Any) -> list[Any]:
    """For each rank [what was counted in the third step, what the formula says]."""
    run = run_of(config.load(preset), parse(layout))
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, **model))

    def work() -> Any:
        from megagpt.parallel.engine import Engine

        ranks.join(world=run.parallel.world_size())
        mesh = mesh_of(run.parallel, ranks.rank())
        engine = Engine(run, mesh)
        share = ROWS // mesh.data
        traffic = Traffic(mesh)
        for step in range(3):
            starts = range(mesh.data_rank * share, (mesh.data_rank + 1) * share, run.train.micro_batch)
            batches = [rows(run, step, start, run.train.micro_batch) for start in starts]
            traffic = Traffic(mesh)
            with traffic:
                engine.train_batch(batches if mesh.reads_data else [], lr=1e-3, count=len(batches))
        numbers = sum(_with_padding(part.parameter, mesh.data) for part in engine.placed)
        both = traffic.found, expected(run, mesh, numbers)
        return [{"/".join(key): size for key, size in counts.items()} for counts in both]

    return on_ranks(work, run.parallel.world_size(), folder)


def _with_padding(parameter: Any, data: int) -> int:
    """Numbers of a parameter that travel: under ZeRO 3 its shards, which are equal, so that the last may be padded."""
    return parameter.partition_numel() * data if hasattr(parameter, "ds_id") else parameter.numel()


def check(found: list[Any]) -> None:
    assert any(counts for counts, _ in found)
    for rank, (counts, formula) in enumerate(found):
        assert counts == formula, f"rank {rank}"


@pytest.mark.parametrize("layout", [*SMALL, "1x4x1/z1/a3"])
def test_a_step_carries_the_bytes_of_the_formula(tmp_path, layout):
    check(counted("gpt3-125m", layout, tmp_path))


@pytest.mark.parametrize("layout", ["1x1x4/z1/a1/sp", "1x2x2/z1/a3", "2x1x1/z3/a3"])
def test_so_it_does_with_rotary_positions_repeated_heads_and_documents(tmp_path, layout):
    check(counted("llama-1b", layout, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("layout", EIGHT)
@pytest.mark.parametrize("preset", ["gpt3-125m", "llama-1b"])
def test_on_eight_ranks_too(tmp_path, preset, layout):
    check(counted(preset, layout, tmp_path))
