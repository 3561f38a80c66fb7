"""The engine against plain torch: the same steps in fp64, without DeepSpeed, ranks or accumulation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megagpt.checkpoint import boxes
from megagpt.config import Model, Optim, Parallel, Run, Train
from megagpt.data.batch import IGNORE, Batch
from megagpt.mesh import mesh_of
from megagpt.model import build, initialise
from megagpt.parallel import ranks
from tests.ranks import on_ranks

MODEL = Model(layers=2, width=32, heads=4, vocabulary=96, context=16, window=5, dropout=0.1, tied=True)
OPTIM = Optim(lr=1e-2, clip_norm=0.5, weight_decay=0.1)
STEPS = 3
ROWS = 8


def run_of(*, zero_stage: int, data: int, micro_batch: int, precision: str = "fp32", recompute: str = "none") -> Run:
    return Run(
        model=MODEL,
        optim=OPTIM,
        parallel=Parallel(data=data, zero_stage=zero_stage),  # type: ignore[arg-type]
        train=Train(global_batch=ROWS, micro_batch=micro_batch, precision=precision, recompute=recompute),  # type: ignore[arg-type]
    )


def rows(step: int) -> Batch:
    """The global batch of a step, with unequal numbers of targets a row."""
    tokens = torch.randint(
        0, MODEL.vocabulary, (ROWS, MODEL.context + 1), generator=torch.Generator().manual_seed(step)
    )
    targets = tokens[:, 1:].clone()
    for row in range(ROWS):
        targets[row, : 2 * row] = IGNORE
    return Batch(tokens[:, :-1], targets, None, torch.arange(step * ROWS, (step + 1) * ROWS))


def part(batch: Batch, start: int, stop: int) -> Batch:
    return Batch(batch.tokens_BT[start:stop], batch.targets_BT[start:stop], None, batch.samples_B[start:stop])


def reference(dtype: torch.dtype) -> dict[str, Any]:
    """Losses, gradient norms and final weights of plain torch."""
    gpt = build(MODEL, seed=1)
    initialise(gpt, MODEL, seed=1)
    gpt = gpt.to(dtype).train()
    decayed = [parameter for parameter in gpt.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in gpt.parameters() if parameter.dim() <= 1]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIM.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=OPTIM.lr,
        betas=(OPTIM.beta1, OPTIM.beta2),
        eps=OPTIM.eps,
    )
    losses, norms = [], []
    for step in range(STEPS):
        batch = rows(step)
        loss = gpt(batch) / (batch.targets_BT != IGNORE).sum()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(gpt.parameters(), OPTIM.clip_norm)))
        adamw.step()
        adamw.zero_grad()
        losses.append(float(loss.detach()))
    return {"losses": losses, "norms": norms, "weights": {name: p.detach() for name, p in gpt.named_parameters()}}


def trained(run: Run) -> dict[str, Any]:
    """The same on this rank, through DeepSpeed; the weights as this rank's slices."""
    from megagpt.parallel.engine import Engine

    mesh = mesh_of(run.parallel, ranks.rank())
    engine = Engine(run, mesh)
    losses, norms = [], []
    mine = ROWS // mesh.data
    for step in range(STEPS):
        starts = range(mesh.data_rank * mine, (mesh.data_rank + 1) * mine, run.train.micro_batch)
        done = engine.train_batch([part(rows(step), at, at + run.train.micro_batch) for at in starts], lr=OPTIM.lr)
        assert not done.skipped
        losses.append(done.loss)
        norms.append(done.grad_norm)
    slices = [(item.name, item.box.start, item.box.size, item.weight.tolist()) for item in engine.owned()]
    return {"losses": losses, "norms": norms, "slices": slices, "counters": engine.counters()}


CASES = [
    *[{"zero_stage": stage, "micro_batch": 4} for stage in range(4)],
    *[{"zero_stage": stage, "micro_batch": 1} for stage in range(4)],
    {"zero_stage": 1, "micro_batch": 2, "recompute": "selective"},
    {"zero_stage": 3, "micro_batch": 2, "recompute": "full"},
    *[{"zero_stage": stage, "micro_batch": 2, "precision": "bf16"} for stage in range(4)],
    *[{"zero_stage": stage, "micro_batch": 2, "precision": "fp16"} for stage in range(4)],
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[dict[str, Any]]]]:
    """World size -> rank -> case -> what the engine did."""

    def work(data: int, cases: list[dict[str, Any]]) -> Any:
        ranks.join(world=data)
        return [trained(run_of(data=data, **case)) for case in cases]

    folder = tmp_path_factory.mktemp("engine")
    return {
        2: on_ranks(lambda: work(2, CASES), 2, folder),
        1: on_ranks(lambda: work(1, [{"zero_stage": stage, "micro_batch": 8} for stage in range(4)]), 1, folder),
    }


@pytest.fixture(scope="module")
def truth() -> dict[str, Any]:
    return reference(torch.float64)


def weights_of(case: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Whole weights from the boxes of all ranks."""
    whole = {name: torch.full(p.shape, torch.nan) for name, p in build(MODEL).named_parameters()}
    for rank in case:
        for name, start, size, values in rank["slices"]:
            part = whole[name][boxes.Box(tuple(start), tuple(size)).slices()]
            assert part.isnan().all(), "two ranks own the same element"
            part.copy_(torch.tensor(values))
    return whole


# fp32's unit roundoff is 6e-8; a few hundred additions and Adam's division leave a thousand of it.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 2e-2}


@pytest.mark.parametrize("number", range(len(CASES)))
def test_two_ranks_train_as_plain_torch_does_on_any_zero_stage_and_accumulation(found, truth, number):
    check([rank[number] for rank in found[2]], truth, CASES[number].get("precision", "fp32"))


@pytest.mark.parametrize("stage", range(4))
def test_one_rank_trains_as_plain_torch_does(found, truth, stage):
    check([rank[stage] for rank in found[1]], truth, "fp32")


def check(case: list[dict[str, Any]], truth: dict[str, Any], precision: str) -> None:
    loss_error = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 5e-3}[precision]
    for rank in case:
        assert rank["losses"] == pytest.approx(truth["losses"], rel=loss_error)
        assert rank["norms"] == pytest.approx(truth["norms"], rel=100 * loss_error if precision == "fp32" else 3e-2)
        assert rank["counters"]["optimizer_steps"] == STEPS
    weights = weights_of(case)
    for name, expected in truth["weights"].items():
        error = (weights[name].double() - expected).abs().max()
        # Where a gradient is nearly zero Adam divides rounding by rounding; a step is bounded by the rate even so.
        bound = 2 * STEPS * OPTIM.lr if precision != "fp32" else TOLERANCE["fp32"]
        assert error <= bound, f"{name} is off by {error}"


def test_the_loss_is_not_that_of_averaging_micro_batches(truth):
    """Rows have 16 to 2 targets: were each micro-batch's mean averaged, the loss would differ visibly."""
    gpt = build(MODEL, seed=1)
    initialise(gpt, MODEL, seed=1)
    batch = rows(0)
    parts = [part(batch, row, row + 1) for row in range(ROWS)]
    with torch.no_grad():
        means = [float(gpt.train()(item)) / int((item.targets_BT != IGNORE).sum()) for item in parts]
    assert abs(sum(means) / ROWS - truth["losses"][0]) > 1e-4


def test_clipping_by_value_bounds_every_gradient_that_adamw_sees(tmp_path: Path):
    def work() -> Any:
        from megagpt.parallel.engine import Engine

        ranks.join(world=1)
        run = run_of(zero_stage=1, data=1, micro_batch=8)
        run = dataclasses.replace(run, optim=dataclasses.replace(OPTIM, clip_norm=0.0, clip_value=1e-3, beta1=0.0))
        engine = Engine(run, mesh_of(run.parallel, 0))
        engine.train_batch([rows(0)], lr=0.0)
        return max(float(item.exp_avg.abs().max()) for item in engine.owned())  # beta1 = 0: the gradient itself

    (largest,) = on_ranks(work, 1, tmp_path)
    assert largest == pytest.approx(1e-3, rel=1e-6)
