"""What a run came to, from the files in its folder: the numbers of `megagpt report --json` and of the page's head."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt import config, ledger
from megagpt.errors import UserError
from megagpt.heal.goodput import Goodput, goodput
from megagpt.report.metrics import read_records

LAST_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """Everything the report reads."""

    run: config.Run
    toml: str
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    yardsticks: dict[str, float]
    goodput: Goodput | None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A run in a few numbers; None where the run has not come to it yet."""

    run: str
    parameters: int
    step: int
    steps: int
    tokens: int
    loss: float | None
    """Mean of the training loss over the last 10 steps, in nats."""
    heldout: list[dict[str, Any]]
    """The last evaluation of each corpus."""
    tokens_per_s: float | None
    """Median over the steps."""
    mfu: float | None
    seconds: float
    """Of all steps; evaluations and checkpoints are not in it."""
    data_wait: float | None
    """Share of these seconds spent waiting for data."""
    yardsticks: dict[str, float]
    goodput: Goodput | None
    """The wall time of all attempts, split; None of a run from before megagpt recorded it."""


def read_run(out: Path) -> RunFiles:
    """Read the folder of a run. Raises UserError if it holds none, or if one of its files is broken."""
    if not (out / "run.toml").is_file():
        raise UserError(
            f"{out} is not a run: it holds no run.toml.", "Give the folder that megagpt train --out wrote."
        )
    run = config.load(str(out / "run.toml"))
    return RunFiles(
        run=run,
        toml=(out / "run.toml").read_text(encoding="utf-8"),
        steps=read_records(out / "metrics.jsonl"),
        evaluations=read_records(out / "evaluations.jsonl"),
        events=read_records(out / "events.jsonl"),
        samples=_json(out / "samples.json", default=[]),
        yardsticks=_json(out / "yardsticks.json", default={}),
        goodput=goodput(out, mtbf_hours=run.checkpoint.mtbf_hours),
    )


def summarise(out: Path, files: RunFiles) -> Summary:
    """The numbers of the run in `out`."""
    steps = files.steps
    losses = [loss for record in steps[-LAST_STEPS:] if (loss := record["loss"]) is not None]
    seconds = sum(record["seconds"] for record in steps)
    mfus = [record["mfu"] for record in steps if record["mfu"] is not None]
    return Summary(
        run=out.resolve().name,
        parameters=ledger.parameters(files.run.model).total(),
        step=steps[-1]["step"] if steps else 0,
        steps=config.steps_of(files.run),
        tokens=steps[-1]["tokens"] if steps else 0,
        loss=statistics.fmean(losses) if losses else None,
        heldout=list({record["corpus"]: record for record in files.evaluations}.values()),
        tokens_per_s=statistics.median(record["tokens_per_s"] for record in steps) if steps else None,
        mfu=statistics.median(mfus) if mfus else None,
        seconds=seconds,
        data_wait=sum(record["data_wait_seconds"] for record in steps) / seconds if seconds else None,
        yardsticks=files.yardsticks,
        goodput=files.goodput,
    )


def _json(path: Path, *, default: Any) -> Any:
    """The content of a JSON file of `default`'s type, or `default` if there is no such file."""
    if not path.exists():
        return default
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.", "Delete it: the report does without.") from error
    if not isinstance(content, type(default)):
        raise UserError(f"{path} holds no JSON {'list' if default == [] else 'object'}.", "Delete it.")
    return content
