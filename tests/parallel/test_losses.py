"""Losses of whole runs: ZeRO stages among themselves, and 50 steps of a cut model beside an uncut one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megagpt import config
from megagpt.mesh import mesh_of
from megagpt.parallel import ranks
from megagpt.verify.compare import UNIT
from megagpt.verify.layouts import parse
from megagpt.verify.measure import measure
from megagpt.verify.task import ROWS, rows, run_of
from tests.ranks import on_ranks


def losses(layout: str, folder: Path) -> list[float]:
    """Three steps without clipping, whose norm each ZeRO stage adds up in another order."""
    run = run_of(config.load("gpt3-125m"), parse(layout))
    run = dataclasses.replace(run, optim=dataclasses.replace(run.optim, clip_norm=0.0))
    assert ranks.run_local(lambda: measure(run, folder, None), run.parallel.world_size()) == 0
    return json.loads((folder / "rank-0.json").read_text())["losses"]


def test_zero_stages_have_the_same_losses_bit_for_bit_on_two_ranks_and_one_micro_batch(tmp_path):
    first, *others = [losses(f"2x1x1/z{stage}/a1", tmp_path) for stage in range(4)]
    assert others == [first] * 3


def test_with_accumulation_stages_0_and_1_do_since_both_reduce_once(tmp_path):
    assert losses("2x1x1/z0/a3", tmp_path) == losses("2x1x1/z1/a3", tmp_path)


@pytest.mark.slow
def test_fifty_steps_on_eight_ranks_and_on_one_have_the_same_losses(tmp_path):
    """Each step adds its rounding to what the weights bring: were that multiplied, a linear bound would break."""
    found = [fifty(layout, tmp_path) for layout in ("2x2x2/z1/a3", "1x1x1/z1/a1")]
    for step, (cut, whole) in enumerate(zip(*found, strict=True), start=1):
        assert cut == pytest.approx(whole, rel=step * 2 * 8 * 6 * UNIT), f"step {step}"


def fifty(layout: str, folder: Path) -> list[float]:
    run = run_of(config.load("gpt3-125m"), parse(layout))

    def work() -> list[float]:
        from megagpt.parallel.engine import Engine

        ranks.join(world=run.parallel.world_size())
        mesh = mesh_of(run.parallel, ranks.rank())
        engine = Engine(run, mesh)
        share = ROWS // mesh.data
        starts = range(mesh.data_rank * share, (mesh.data_rank + 1) * share, run.train.micro_batch)
        return [
            engine.train_batch(
                [rows(run, step, start, run.train.micro_batch) for start in starts], lr=1e-3, count=len(starts)
            ).loss
            for step in range(50)
        ]

    return on_ranks(work, run.parallel.world_size(), folder)[0]
