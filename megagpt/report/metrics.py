"""What a run writes down while it trains: one JSON object a line, appended, whole at every moment.

    metrics.jsonl      one StepRecord a step
    evaluations.jsonl  one EvaluationRecord an evaluation
    events.jsonl       started, resumed, checkpoint, stopped, ... with the time in UTC

A line leaves the process in one write, so that a killed process tears at most the last one; opening the file again
heals it. `sync` puts all lines on disk: call it before the checkpoint that covers them is committed. On a resume the
lines after the resumed step are dropped, atomically, so that every step stands in the file exactly once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from megagpt.errors import UserError
from megagpt.files import write_whole


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step. What is not a finite number is written as null."""

    step: int
    """The step that was just done, from 1."""
    loss: float
    """Mean over the unmasked target tokens of the global batch, in nats."""
    grad_norm: float
    """Global norm of the gradients, before clipping."""
    lr: float
    tokens: int
    """Tokens of the run so far, this step's included."""
    tokens_per_s: float
    """Of all ranks together, over this step."""
    mfu: float | None
    """Share of the peak, from 0 to 1; None where the device's peak is unknown."""
    hfu: float | None
    batch: int
    """Sequences of this step's global batch."""
    seconds: float
    """Wall-clock of the step, waiting for data included."""
    data_wait_seconds: float
    memory_gib: float
    """Most memory that this rank's device (on a CPU: the process) has held so far."""
    loss_scale: float | None = None
    """fp16 only."""
    skipped: bool = False
    """The loss or a gradient was not a finite number, and the weights stayed as they were."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """The loss on held-out sequences of one corpus, after `step` steps."""

    step: int
    tokens: int
    """Tokens the model was trained on so far."""
    corpus: str
    loss: float
    """Mean over the unmasked target tokens, in nats."""
    perplexity: float
    bits_per_byte: float
    """The same loss over the bytes that the tokens stand for: comparable between tokenizers."""
    sequences: int


class Records:
    """An append-only file of JSON lines. `open_metrics` and its siblings make one."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def append(self, record: StepRecord | EvaluationRecord | dict[str, Any]) -> None:
        """Write one line. It survives the death of this process at once, and a power cut after `sync`."""
        values = record if isinstance(record, dict) else dataclasses.asdict(record)
        line = json.dumps({name: _finite(value) for name, value in values.items()}, allow_nan=False)
        self._file.write(line.encode() + b"\n")

    def sync(self) -> None:
        """Wait until every line is on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_metrics(out: Path, resume_step: int) -> Records:
    """`out`/metrics.jsonl, holding the steps up to `resume_step` (0: none), ready for the next one.

    Raises UserError, with the line's number, if a line other than the last is not a record.
    """
    return _open_at(out / "metrics.jsonl", resume_step)


def open_evaluations(out: Path, resume_step: int) -> Records:
    """`out`/evaluations.jsonl, as `open_metrics`; an evaluation after `resume_step` itself is kept."""
    return _open_at(out / "evaluations.jsonl", resume_step)


def open_events(out: Path) -> Records:
    """`out`/events.jsonl: nothing is ever dropped from it but a torn last line."""
    path = out / "events.jsonl"
    _rewrite(path, read_records(path))
    return Records(path)


def record_event(events: Records, event: str, **details: Any) -> None:
    """Append `event` with the time in UTC, and wait until it is on disk."""
    events.append({"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "event": event, **details})
    events.sync()


def append_event(out: Path, event: str, **details: Any) -> None:
    """Append `event` to `out`/events.jsonl from a process that may not be the one that has it open."""
    with Records(out / "events.jsonl") as events:
        record_event(events, event, **details)


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of one file, without a torn last line; none if it does not exist.

    Raises UserError, with the line's number, if another line is not a JSON object.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:  # no JSON, or no UTF-8
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number < len(lines):
            raise UserError(f"{path}, line {number}: not a JSON object.", "Delete this line, or restore the file.")
    return records


def _open_at(path: Path, resume_step: int) -> Records:
    records = read_records(path)
    for number, record in enumerate(records, start=1):
        if type(record.get("step")) is not int:
            raise UserError(
                f"{path}, line {number}: no whole number 'step'.", "Delete this line, or restore the file."
            )
    _rewrite(path, [record for record in records if record["step"] <= resume_step])
    return Records(path)


def _rewrite(path: Path, records: list[dict[str, Any]]) -> None:
    """Make `records` the whole content of `path`, unless it is already."""
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    if path.exists() and path.read_bytes() != content:
        write_whole(path, content)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
