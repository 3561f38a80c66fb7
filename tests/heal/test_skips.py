"""A step that is not finite, on every engine: nothing changes, all ranks know, and the next goes on as without it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megagpt import config
from megagpt.config import Run
from megagpt.mesh import mesh_of
from megagpt.parallel import ranks
from megagpt.verify.layouts import parse
from megagpt.verify.task import rows, run_of
from tests.ranks import on_ranks

CASES = [
    *[f"2x1x1/z{stage} {precision}" for stage in range(4) for precision in ("fp32", "bf16", "fp16")],
    *[f"1x2x1/z{stage}/a2 {precision}" for stage in (0, 1) for precision in ("fp32", "bf16")],
    "1x1x2/z1/a2/sp fp32",
]


def spoilt_gradient(engine: Any) -> None:
    """Rank 1's next gradient of the first parameter that it has is not finite."""
    if engine.mesh.rank == 1:
        hook = engine.placed[0].parameter.register_hook(lambda gradient: (hook.remove(), gradient * torch.inf)[1])


def spoilt_loss(engine: Any) -> None:
    """Rank 1's next loss is not a number, and its gradients are."""
    train = engine._driver.train

    def spoilt(*arguments: Any, before_step: Any, **values: Any) -> Any:
        engine._driver.train = train
        off = torch.nan if engine.mesh.rank == 1 else 0.0
        return train(*arguments, before_step=lambda own: before_step(own + off), **values) + off

    engine._driver.train = spoilt


def state(engine: Any) -> list[torch.Tensor]:
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    return [getattr(part, kind).clone() for part in engine.held() for kind in kinds]


def equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, two))


def trial(run: Run) -> dict[str, Any]:
    """Steps 0, two spoilt ones and 2, beside steps 0 and 2."""
    from megagpt.parallel.engine import Engine

    mesh = mesh_of(run.parallel, ranks.rank())
    own = run.train.global_batch // mesh.data

    def step(engine: Engine, number: int) -> Any:
        starts = range(mesh.data_rank * own, (mesh.data_rank + 1) * own, run.train.micro_batch)
        batches = [rows(run, number, at, run.train.micro_batch) for at in starts] if mesh.reads_data else []
        return engine.train_batch(batches, lr=1e-2, count=own // run.train.micro_batch)

    engine, other = Engine(run, mesh), Engine(run, mesh)
    step(engine, 0)
    step(other, 0)
    before, applied = state(engine), engine.counters()["optimizer_steps"]
    skipped = []
    for spoil in (spoilt_gradient, spoilt_loss):
        spoil(engine)
        skipped.append(step(engine, 1))
    found = {
        "skipped": [done.skipped for done in skipped],
        "seen_by": [done.seen_by for done in skipped],
        "unchanged": equal(before, state(engine)) and engine.counters()["optimizer_steps"] == applied,
    }
    done, straight = step(engine, 2), step(other, 2)
    found["goes on"] = not done.skipped and not equal(before, state(engine))
    found["as if it had not been"] = done.loss == straight.loss and equal(state(engine), state(other))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """Rank -> case -> what it saw."""

    def work() -> Any:
        ranks.join(world=2)
        results = []
        for case in CASES:
            layout, precision = case.split()
            run = run_of(config.load("gpt3-125m"), parse(layout))
            results.append(trial(dataclasses.replace(run, train=dataclasses.replace(run.train, precision=precision))))
        return results

    return on_ranks(work, 2, tmp_path_factory.mktemp("skips"))


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_is_as_if_it_had_not_been(found, case):
    for seen in found:
        result = seen[CASES.index(case)]
        assert result["skipped"] == [True, True]
        assert result["seen_by"][1] == 1
        assert result["seen_by"] == found[0][CASES.index(case)]["seen_by"]
        assert result["unchanged"]
        if "fp16" not in case:  # where the loss scale falls, rounding changes
            assert result["goes on"]
            assert result["as if it had not been"]
