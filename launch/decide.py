"""What follows an attempt: a pure function of how it ended and of what was tried before. Standard library alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megagpt.launch.spec import Retries
from megagpt.outcome import Outcome

MOST_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt that has ended."""

    job: str
    """The job and its restart: 4711.2."""
    progress: bool
    """Whether it committed a checkpoint."""
    outcome: Outcome


@dataclass(frozen=True)
class Decision:
    """What to do, and why, in words."""

    action: Literal["end", "restart", "leave"]
    """end: for good. restart: here, on the nodes of this job. leave: give the nodes back and come again later."""
    why: str
    pause_seconds: float = 0.0


def decide(history: Sequence[Attempt], retries: Retries, *, enough_nodes: bool) -> Decision:
    """What to do after the last attempt of `history`; `enough_nodes`: this job has as many good ones as it needs."""
    last = history[-1]
    outcome = last.outcome
    if outcome.result == "finished":
        return Decision("end", "the run is done")
    if outcome.result == "stopped":
        return (
            _come_again(history, retries, str(outcome)) if outcome.retry != "never" else Decision("end", str(outcome))
        )
    if outcome.retry == "never":
        return Decision("end", f"{outcome}; another attempt would end the same way")
    barren = fruitless(history)
    if barren >= retries.without_progress:
        return Decision("end", f"{outcome}; {barren} attempts in a row without a new checkpoint")
    if not enough_nodes:
        return _come_again(history, retries, f"{outcome}; too few good nodes are left in this job")
    here = sum(attempt.job == last.job for attempt in history)
    if here > retries.inside:
        return _come_again(history, retries, f"{outcome}; {here - 1} restarts in this job are the limit")
    wait = 0.0 if outcome.retry == "exclude_node" or not barren else retries.back_off_seconds * 2.0 ** (barren - 1)
    return Decision("restart", str(outcome), min(wait, MOST_SECONDS))


def fruitless(history: Sequence[Attempt]) -> int:
    """How many failed attempts in a row, up to the last, committed nothing."""
    count = 0
    for attempt in reversed(history):
        if attempt.progress or attempt.outcome.result != "failed":
            break
        count += 1
    return count


def _come_again(history: Sequence[Attempt], retries: Retries, why: str) -> Decision:
    used = len({attempt.job for attempt in history}) - 1
    if used >= retries.requeues:
        return Decision("end", f"{why}; the job went back to the queue {used} times, which is the limit")
    return Decision("leave", why)
