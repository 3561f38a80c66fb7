"""Where a rank's time goes: at every moment it is in one phase, so that the phases' times add up to the wall clock.

start        from the command to the first step: imports, joining the other ranks, building, loading
compile      the first step of an attempt
data         waiting for the next batch
step         forward, backward and update
repeated     the same, of a step that an earlier attempt, or this one before it went back, had done already
evaluation, save, end
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass
from typing import Literal

Phase = Literal["start", "compile", "data", "step", "repeated", "evaluation", "save", "end"]
COMPUTING: tuple[Phase, ...] = ("compile", "step", "repeated")
_STEPS_KEPT = 64


@dataclass(frozen=True)
class Mark:
    """The rank's last sign of progress: it entered `phase` of `step` at `since`, in seconds since 1970."""

    phase: Phase
    step: int
    since: float


class Clock:
    """Times of one rank in one attempt. The training thread enters phases; another one may read."""

    def __init__(self, began: float) -> None:
        """`began`: when the command did, in seconds since 1970."""
        self.began = began
        self._offset = time.time() - time.monotonic()  # the wall clock may be set while the run lasts
        self._now: tuple[Mark, dict[str, float]] = (Mark("start", 0, began), {})  # replaced whole: a thread reads it
        self.reached = 0
        """The furthest step that was ever done; one up to it is a repeated one."""
        self.saves = 0
        self.repeats_first = False
        """The first step of the attempt had been done before."""
        self._computed = False
        self._durations: deque[float] = deque(maxlen=_STEPS_KEPT)

    def now(self) -> float:
        """Seconds since 1970, by a clock that nobody sets."""
        return time.monotonic() + self._offset

    def enter(self, phase: Phase, step: int) -> None:
        """From now on this rank is in `phase` of `step`."""
        now, (last, seconds) = self.now(), self._now
        seconds = {**seconds, last.phase: seconds.get(last.phase, 0.0) + now - last.since}
        if last.phase in ("step", "repeated"):
            self._durations.append(now - last.since)
        if phase in COMPUTING:
            self._computed = True
            self.reached = max(self.reached, step)
        self.saves += phase == "save"
        self._now = (Mark(phase, step, now), seconds)

    def computing(self, step: int) -> Phase:
        """The phase in which `step` is computed."""
        if not self._computed:
            self.repeats_first = step <= self.reached
            return "compile"
        return "repeated" if step <= self.reached else "step"

    def mark(self) -> Mark:
        return self._now[0]

    def seconds(self) -> dict[str, float]:
        """Each phase's time so far, up to now: their sum is the time since the attempt began."""
        last, found = self._now
        return {**found, last.phase: found.get(last.phase, 0.0) + self.now() - last.since}

    def median_step(self) -> float:
        """Seconds of a usual step; 0 before the second one is done."""
        return statistics.median(self._durations) if self._durations else 0.0
