"""What a run prints: the plan as a table, then a line a report; on a terminal also colour and a progress bar.

Each line stands alone, so that logs can be searched and followed. Loss, gradient norm and learning rate are those of
the printed step; speed, MFU and data wait are over all steps since the line before.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import IO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from megagpt import ledger
from megagpt.report.metrics import EvaluationRecord, StepRecord
from megagpt.report.text import count, duration, share

PLAN_LINES = 15


def plan_lines(rows: Sequence[tuple[str, str]]) -> list[str]:
    """(name, value) rows as aligned lines. Raises ValueError if there are more than 15: a plan fits a glance."""
    if len(rows) > PLAN_LINES:
        raise ValueError(f"a plan has at most {PLAN_LINES} lines, not {len(rows)}")
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {name:<{width}}  {value}" for name, value in rows]


def speed(records: Sequence[StepRecord]) -> float:
    """Tokens per second over several steps."""
    seconds = sum(record.seconds for record in records)
    return sum(record.tokens_per_s * record.seconds for record in records) / seconds if seconds > 0 else 0.0


def step_line(records: Sequence[StepRecord], *, steps: int, seconds_left: float) -> Text:
    """The line for the last of `records`, all of which were done since the line before, in a run of `steps` steps."""
    last, seconds = records[-1], max(sum(record.seconds for record in records), 1e-9)
    mfu = None if last.mfu is None else sum((record.mfu or 0) * record.seconds for record in records) / seconds
    wait = sum(record.data_wait_seconds for record in records) / seconds
    parts = [
        (f"step {last.step:>{len(f'{steps:,}')},}/{steps:,}", "dim"),
        ("  loss ", "dim"),
        (f"{last.loss:7.4f}", "bold"),
        (f"  norm {last.grad_norm:6.2f}  lr {last.lr:.2e}", "dim"),
        (f"  {count(speed(records))} tok/s", "green"),
        (f"  MFU {share(mfu)}  mem {last.memory_gib:.1f} GiB  wait {share(wait)}", "dim"),
        (f"  left {duration(seconds_left)}", ""),
    ]
    skipped = sum(record.skipped for record in records)
    if skipped:
        scale = "" if last.loss_scale is None else f", loss scale {last.loss_scale:,.0f}"
        parts.append((f"  {skipped} skipped{scale}", "yellow"))
    return Text.assemble(*parts)


class Console:
    """The voice of one run, on its first rank. Use it as a context: its end removes the progress bar."""

    def __init__(self, *, steps: int, total_tokens: int, every: int, stream: IO[str] | None = None) -> None:
        """`steps` and `total_tokens` are those of the whole run; a line comes after each `every` steps."""
        self._steps = steps
        self._total_tokens = total_tokens
        self._every = every
        self._since: list[StepRecord] = []
        self._spoke = False
        file = sys.stdout if stream is None else stream
        self._rich = RichConsole(file=file, force_terminal=file.isatty(), highlight=False, soft_wrap=True)
        self._bar = Progress(
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,}/{task.total:,}  {task.fields[left]} left"),
            console=self._rich,
            transient=True,
            auto_refresh=False,
            disable=not file.isatty(),
        )
        self._task = self._bar.add_task("", total=steps, left="")

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def plan(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Print what is about to happen, in up to 15 lines."""
        self._print(Text(title, style="bold"))
        for line in plan_lines(rows):
            self._print(Text(line))

    def note(self, text: str) -> None:
        """Print one line that is neither a step nor a warning."""
        self._print(Text(text))

    def warn(self, text: str) -> None:
        """Print a warning; `text` says what it costs."""
        self._print(Text(f"warning: {text}", style="yellow"))

    def step(self, record: StepRecord) -> None:
        """Take note of every step; print the first one seen, the last and each `every`-th."""
        self._since.append(record)
        left = ledger.time_left(tokens=record.tokens, total_tokens=self._total_tokens, tokens_per_s=speed(self._since))
        if not self._spoke or record.step % self._every == 0 or record.step == self._steps:
            self._print(step_line(self._since, steps=self._steps, seconds_left=left))
            self._since.clear()
            self._spoke = True
            self._bar.start()
        self._bar.update(self._task, completed=record.step, left=duration(left), refresh=True)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Print one evaluation."""
        figures = (
            f"loss {record.loss:.4f}  perplexity {record.perplexity:,.2f}  {record.bits_per_byte:.4f} bits per byte"
        )
        self._print(Text(f"held out, {record.corpus}:  {figures}", style="cyan"))

    def _print(self, line: Text) -> None:
        self._rich.print(line, soft_wrap=True)
