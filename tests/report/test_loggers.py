"""TensorBoard and Weights & Biases (a stand-in: its package needs an account)."""

import math
import sys
import types

import pytest

from megagpt import config
from megagpt.errors import UserError
from megagpt.report.loggers import open_loggers, scalars
from megagpt.report.metrics import EvaluationRecord, StepRecord


def a_step(step, **changes):
    values = {
        "loss": 3.25, "grad_norm": 0.5, "lr": 6e-4, "tokens": 1000, "tokens_per_s": 500.0, "mfu": None, "hfu": None,
        "batch": 2, "seconds": 2.0, "data_wait_seconds": 0.02, "memory_gib": 1.5,
    }  # fmt: skip
    return StepRecord(step=step, **(values | changes))


def an_evaluation(step):
    figures = {"loss": 2.0, "perplexity": 7.39, "bits_per_byte": 0.9, "sequences": 8}
    return EvaluationRecord(step=step, tokens=1000, corpus="prose", **figures)


@pytest.fixture
def wandb(monkeypatch):
    """A module that remembers what it was told."""
    module = types.SimpleNamespace(started=[], logged=[], finished=[])
    run = types.SimpleNamespace(
        log=lambda values, step: module.logged.append((step, values)), finish=lambda: module.finished.append(True)
    )
    ids = iter(["first", "second"])
    module.util = types.SimpleNamespace(generate_id=lambda: next(ids))
    module.init = lambda **arguments: module.started.append(arguments) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def run_with(**report):
    return config.Run(report=config.Report(**report))


def test_nothing_is_opened_that_was_not_asked_for(tmp_path):
    assert open_loggers(config.Run(), tmp_path, 0) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_holds_each_number_of_each_step_once_after_a_resume(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resumed, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        (logger,) = open_loggers(run_with(tensorboard=True), tmp_path, resumed)
        for step in steps:
            logger.step(a_step(step, loss=float(step)))
        logger.evaluation(an_evaluation(steps[-1]))
        logger.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert [event.step for event in events.Scalars("heldout/prose/bits_per_byte")] == [4]
    assert "train/mfu" not in events.Tags()["scalars"]


def test_wandb_gets_project_configuration_and_numbers(tmp_path, wandb):
    run = run_with(wandb="gpt")
    (logger,) = open_loggers(run, tmp_path, 0)
    logger.step(a_step(1))
    logger.evaluation(an_evaluation(1))
    logger.close()
    assert wandb.started[0]["project"] == "gpt"
    assert wandb.started[0]["config"]["model"]["width"] == run.model.width
    assert [step for step, _ in wandb.logged] == [1, 1]
    assert wandb.logged[0][1]["train/loss"] == 3.25
    assert wandb.logged[1][1]["heldout/prose/loss"] == 2.0
    assert wandb.finished == [True]


def test_wandb_continues_the_same_run_on_a_resume_and_only_then(tmp_path, wandb):
    for resumed in (0, 5, 0):
        open_loggers(run_with(wandb="gpt"), tmp_path, resumed)
    assert [arguments["id"] for arguments in wandb.started] == ["first", "first", "second"]


@pytest.mark.parametrize(("package", "report"), [("tensorboard", {"tensorboard": True}), ("wandb", {"wandb": "gpt"})])
def test_a_missing_package_names_the_setting_and_the_extra(tmp_path, monkeypatch, package, report):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"report\.{package} = .*\n.*megagpt\[{package}\]"):
        open_loggers(run_with(**report), tmp_path, 0)


def test_only_finite_numbers_are_logged():
    numbers = scalars(a_step(1, loss=math.nan, grad_norm=math.inf))
    assert not {"loss", "grad_norm", "mfu", "step", "loss_scale"} & set(numbers)
    assert numbers["tokens_per_s"] == 500.0
