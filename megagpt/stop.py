"""Stop politely: a signal or the run's stop file asks the run to save after the step it is in, and to end well.

    <out>/stop          {"cause": "asked" | "preempted" | "time_limit"}

The first rank alone looks for the file, and the ranks agree at the end of a step. Schedulers send SIGTERM more than
once and SIGKILL when they have lost patience, so only a second SIGINT, which is a person's, ends a run at once.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from megagpt.files import write_whole
from megagpt.outcome import Cause

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
NAME = "stop"
LOOK_SECONDS = 0.5
CAUSES: tuple[Cause, ...] = ("asked", "preempted", "time_limit")


def ask(out: Path, cause: Cause = "asked") -> None:
    """Ask the run in `out` to save and stop."""
    write_whole(out / NAME, json.dumps({"cause": cause}))


def asked(out: Path) -> Cause | None:
    """Why the run in `out` is asked to stop, or None. An empty file, as `touch` makes it, is a wish of the user's."""
    try:
        if NAME not in os.listdir(out):  # noqa: PTH208 - opening the folder is what makes NFS ask its server
            return None
        text = (out / NAME).read_text(encoding="utf-8")
        content: Any = json.loads(text) if text.strip() else {}
    except FileNotFoundError:
        return None
    except ValueError:
        return "asked"
    cause = content.get("cause") if isinstance(content, dict) else None
    return cause if cause in CAUSES else "asked"


def forget(out: Path) -> None:
    """Take the wish back: it was fulfilled, or a new start makes it void."""
    (out / NAME).unlink(missing_ok=True)


class StopSignal:
    """A context in which `cause()` says why this rank is asked to stop, by a signal or (with `out`) by the file."""

    def __init__(self, out: Path | None = None) -> None:
        self._out = out
        self._cause: Cause | None = None
        self._looked = 0.0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def cause(self) -> Cause | None:
        """None while nobody asks; cheap enough to be called at every step."""
        if self._out is not None and time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            self._cause = asked(self._out) or self._cause
        return self._cause

    def code(self) -> int:
        """The cause as a number that ranks can compare: 0 for none, else its place in CAUSES, from 1."""
        cause = self.cause()
        return CAUSES.index(cause) + 1 if cause else 0

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self._cause = self._cause or "asked"
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
