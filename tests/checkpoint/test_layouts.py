"""A checkpoint of any layout goes on in any other, with the same weights, moments and next step."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megagpt import config
from megagpt.checkpoint import lineage
from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.folders import folder_at
from megagpt.checkpoint.load import check_model, load, newest_valid, whole_tensors
from megagpt.checkpoint.save import save
from megagpt.config import Run
from megagpt.mesh import mesh_of
from megagpt.parallel import ranks
from megagpt.verify.layouts import parse
from megagpt.verify.task import ROWS, rows, run_of
from tests.ranks import on_ranks

# Each goes on from the one before it: every kind of cut is written, and read by every other kind.
JOURNEY = ["2x2x1/z1/a3", "1x1x4/z0/a1/sp", "2x1x2/z3/a1", "1x2x2/z1/a4", "4x1x1/z2/a1", "1x1x1/z1/a1", "1x4x1/z0/a3"]


def run_on(layout: str) -> Run:
    run = run_of(config.load("gpt3-125m"), parse(layout))
    return dataclasses.replace(run, model=dataclasses.replace(run.model, kv_heads=2, biases="all"))


def go_on(run: Run, root: Path, step: int) -> dict[str, Any]:
    """Load the newest checkpoint if there is one, save it again as it was loaded, and train one step."""
    from megagpt.parallel.engine import Engine

    ranks.join(world=run.parallel.world_size())
    mesh = mesh_of(run.parallel, ranks.rank())
    engine = Engine(run, mesh)
    manifest, faults = newest_valid(folder_at(root), rank=mesh.rank, ranks=mesh.world_size)
    assert not faults
    if manifest is not None:
        check_model(manifest, engine.shapes())
        load(manifest, engine.held())
        engine.restored(manifest.header["counters"])
        again = root.parent / f"again-{step}"
        write(engine, again, step)
    share = ROWS // mesh.data
    starts = range(mesh.data_rank * share, (mesh.data_rank + 1) * share, run.train.micro_batch)
    batches = [rows(run, step, start, run.train.micro_batch) for start in starts]
    done = engine.train_batch(batches if mesh.reads_data else [], lr=run.optim.lr, count=len(batches))
    write(engine, root, step + 1)
    return {"loss": done.loss, "norm": done.grad_norm}


def write(engine: Any, root: Path, step: int) -> None:
    mesh = engine.mesh
    generation = lineage.begin(folder_at(root), None) if mesh.rank == 0 and not root.exists() else 1
    folder = lineage.commit_folder(folder_at(root), -ranks.lowest_over_ranks(-generation), step)
    save(folder, engine.owned(), header={"counters": engine.counters()}, rank=mesh.rank, ranks=mesh.world_size)


def state(root: Path) -> dict[str, torch.Tensor]:
    manifest, _ = newest_valid(folder_at(root))
    assert manifest is not None
    return {f"{kind}/{name}": value for kind, name, value in whole_tensors(manifest)}


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The steps of a run that changes its layout every step, and of one that stays on one rank."""
    outcomes: dict[str, Any] = {"moved": [], "stayed": [], "same": []}
    folder = tmp_path_factory.mktemp("journey")
    for name, layouts in {"moved": JOURNEY, "stayed": ["1x1x1/z1/a1"] * len(JOURNEY)}.items():
        root = folder / name / "checkpoints"
        root.parent.mkdir()
        for step, layout in enumerate(layouts):
            run = run_on(layout)
            before = state(root) if step else {}
            found = on_ranks(
                lambda run=run, root=root, step=step: go_on(run, root, step), run.parallel.world_size(), folder
            )
            outcomes[name].append(found)
            if step and name == "moved":
                again = state(root.parent / f"again-{step}")
                outcomes["same"].append([key for key, value in before.items() if not torch.equal(value, again[key])])
    return outcomes


@pytest.mark.parametrize("step", range(1, len(JOURNEY)))
def test_what_a_layout_loads_and_saves_again_is_bit_for_bit_what_another_saved(journey, step):
    assert journey["same"][step - 1] == []


@pytest.mark.parametrize("step", range(len(JOURNEY)))
def test_a_run_that_changes_its_layout_every_step_has_the_losses_of_one_that_does_not(journey, step):
    true = journey["stayed"][step][0]
    for rank in journey["moved"][step]:
        assert rank["loss"] == pytest.approx(true["loss"], rel=1e-6)
        assert rank["norm"] == pytest.approx(true["norm"], rel=1e-4)


def test_a_box_that_nobody_saved_is_noticed(tmp_path: Path):
    from megagpt.parallel.state import Slice

    value = torch.zeros(2, 3)
    half = [Slice("a", (4, 3), Box((0, 0), (2, 3)), value, value.clone(), value.clone())]
    with pytest.raises(AssertionError, match="a: 6 of 12 elements are there"):
        save(folder_at(tmp_path / "step"), half, header={}, rank=0, ranks=1)
