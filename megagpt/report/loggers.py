"""Where a run's numbers go besides its own folder: TensorBoard and Weights & Biases, each only when it was asked for.

`require_packages` is called before any rank starts, so that a missing package costs no queue time.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any, Protocol

from megagpt import config
from megagpt.errors import UserError
from megagpt.report.metrics import EvaluationRecord, StepRecord


class Logger(Protocol):
    """One place that takes records."""

    def step(self, record: StepRecord) -> None: ...

    def evaluation(self, record: EvaluationRecord) -> None: ...

    def close(self) -> None: ...


def open_loggers(run: config.Run, out: Path, resume_step: int) -> list[Logger]:
    """The loggers that `run.report` asks for, ready for the step after `resume_step` (0: a run that starts).

    Raises UserError, naming the extra to install, if a package is missing.
    """
    require_packages(run.report)
    loggers: list[Logger] = []
    if run.report.tensorboard:
        loggers.append(TensorBoard(out / "tensorboard", resume_step))
    if run.report.wandb:
        loggers.append(WandB(run, out, resume_step))
    return loggers


def require_packages(report: config.Report) -> None:
    """Raise UserError, naming the extra to install, if a logger that `report` asks for lacks its package."""
    for package, setting in (("tensorboard", report.tensorboard), ("wandb", report.wandb)):
        if setting and sys.modules.get(package) is None and importlib.util.find_spec(package) is None:
            rule = f"report.{package} = {setting!r} needs the package {package}, which is not installed."
            raise UserError(rule, f"pip install 'megagpt[{package}]'")


class TensorBoard:
    """Events in `folder`: each number of a record under train/, evaluations under heldout/CORPUS/."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def step(self, record: StepRecord) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(f"train/{name}", value, record.step)

    def evaluation(self, record: EvaluationRecord) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(f"heldout/{record.corpus}/{name}", value, record.step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A W&B run named after the folder, continued by its id when the folder is resumed.

    W&B keeps what it got first for a step, and warns: no loss, since a resumed run repeats its steps exactly.
    """

    def __init__(self, run: config.Run, out: Path, resume_step: int) -> None:
        import wandb

        identity = out / "wandb.id"
        if resume_step and identity.is_file():
            name = identity.read_text(encoding="utf-8").strip()
        else:
            name = wandb.util.generate_id()
            identity.write_text(name + "\n", encoding="utf-8")
        self._run = wandb.init(
            project=run.report.wandb,
            name=out.resolve().name,
            id=name,
            resume="allow",
            dir=str(out),
            config=dataclasses.asdict(run),
        )

    def step(self, record: StepRecord) -> None:
        self._run.log({f"train/{name}": value for name, value in scalars(record).items()}, step=record.step)

    def evaluation(self, record: EvaluationRecord) -> None:
        values = {f"heldout/{record.corpus}/{name}": value for name, value in scalars(record).items()}
        self._run.log(values, step=record.step)

    def close(self) -> None:
        self._run.finish()


def scalars(record: StepRecord | EvaluationRecord) -> dict[str, float]:
    """The finite numbers of a record, without its step."""
    values: dict[str, Any] = dataclasses.asdict(record)
    del values["step"]
    return {name: float(value) for name, value in values.items() if _is_finite_number(value)}


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, bool | int | float) and math.isfinite(value)
