"""The watchdog: a thread of every rank that writes its heartbeat, and ends a rank that makes no more progress.

A rank hangs if it has been in one phase of one step for longer than
    heal.hang_factor x its median step + heal.hang_seconds     while it waits for data or computes
    heal.slow_seconds                                          elsewhere, and in the first step
Usually all ranks do then, since they wait for one of them. Each writes its stacks, waits a moment for the others to do
so too, compares everybody's last beats, and ends with the name of the rank that is behind: the process group would let
it wait for half an hour. The thread does not need the training thread, which may be stuck in a collective. Should it
not get Python's lock either, a timer in C, which it has to wind up at every beat, writes the stacks and ends the rank.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

from megagpt.config import Heal
from megagpt.heal.attempts import Beat, read_beats, write_beat
from megagpt.heal.clock import Clock

HANG_STATUS = 70
_RANKS_PER_SECOND = 200  # beats that a shared file system takes without noticing
_PATIENCE = 3.0  # seconds in which the other ranks can write their stacks
_ORDER = {"start": 0, "data": 1, "compile": 2, "step": 2, "repeated": 2, "evaluation": 3, "save": 4, "end": 5}


class Watchdog:
    """Watches the thread that enters the context, and counts on `clock` being told of its progress."""

    def __init__(
        self, heal: Heal, clock: Clock, folder: Path, *, rank: int, world: int, tell: Callable[[Beat, str, bool], None]
    ) -> None:
        """`tell` is called before a rank ends that hangs, with the beat of the rank that is behind, the verdict in
        words, and whether this rank is the first of those that say so.
        """
        self._heal, self._clock, self._folder = heal, clock, folder
        self._rank, self._world, self._tell = rank, world, tell
        self._host = socket.gethostname()
        self._interval = 1.0 + world / _RANKS_PER_SECOND
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._watched = threading.get_ident()
        self._over = threading.Event()
        self.ending = "finished"
        """How the attempt ends if it ends well."""

    def __enter__(self) -> Watchdog:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stacks = (self._folder / f"stacks-{self._rank:05d}.txt").open("a")
        self._beat("")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()
        self._clock.enter("end", self._clock.mark().step)
        self._beat(self.ending if kind is None else getattr(error, "cause", kind.__name__))

    def limit(self) -> float:
        """Seconds that the present phase may take."""
        if self._clock.mark().phase in ("data", "step", "repeated") and (usual := self._clock.median_step()):
            return self._heal.hang_factor * usual + self._heal.hang_seconds
        return self._heal.slow_seconds

    def _watch(self) -> None:
        while not self._over.wait(self._interval):
            late = self._clock.now() - self._clock.mark().since - self.limit()
            if late > 0:
                self._end()
            patience = max(self._heal.slow_seconds, self.limit()) + 2 * _PATIENCE + self._interval
            faulthandler.dump_traceback_later(patience, exit=True, file=self._stacks)
            self._beat("")

    def _beat(self, ended: str, *, hanging: bool = False) -> Beat:
        mark, frame = self._clock.mark(), sys._current_frames().get(self._watched)
        seconds = self._clock.seconds()
        beat = Beat(
            rank=self._rank,
            host=self._host,
            began=self._clock.began,
            beat=self._clock.began + sum(seconds.values()),
            phase=mark.phase,
            step=mark.step,
            since=mark.since,
            place=_place(frame),
            waiting=_waiting(frame),
            hanging=hanging,
            ended=ended,
            saves=self._clock.saves,
            repeats_first=self._clock.repeats_first,
            median_step=self._clock.median_step(),
            seconds=seconds,
        )
        write_beat(self._folder, beat)
        return beat

    def _end(self) -> NoReturn:
        """Write the stacks, find out who is behind, and end this process without a word to the others."""
        try:
            own = self._beat("hang", hanging=True)
            self._stacks.write(f"step {own.step:,}, {own.phase}, {own.beat - own.since:.1f} s without progress\n")
            self._stacks.flush()
            faulthandler.dump_traceback(self._stacks, all_threads=True)
            stale = own.beat - 2 * self._interval
            beats = self._beats_of_all(stale)
            culprit = behind(beats, stale=stale)
            first = min(beat.rank for beat in beats if beat.hanging)
            self._tell(culprit, describe(culprit, own, stale=stale), self._rank == first)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(HANG_STATUS)  # the training thread may never return, and no destructor may wait for other ranks

    def _beats_of_all(self, stale: float) -> Sequence[Beat]:
        """The last beats, once every rank that has beaten since `stale` has found that it hangs, or time is up."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            beats = read_beats(self._folder)
            complete = len(beats) == self._world and all(beat.hanging or beat.beat <= stale for beat in beats)
            if complete or time.monotonic() > deadline:
                return beats
            time.sleep(0.1)


def behind(beats: Sequence[Beat], *, stale: float) -> Beat:
    """The rank that the others wait for: of the earliest step and phase; of these one without a beat since `stale`,
    else one that does not wait for others; then the one that has been there for longest.
    """
    return min(
        beats, key=lambda beat: (beat.step, _ORDER[beat.phase], beat.beat > stale, beat.waiting, beat.since, beat.rank)
    )


def describe(culprit: Beat, own: Beat, *, stale: float) -> str:
    """The verdict, in words."""
    seconds = own.beat - culprit.since
    where = f"in phase {culprit.phase} of step {culprit.step:,} for {seconds:.1f} s, at {culprit.place}"
    if culprit.beat <= stale:
        where += f"; its process has not run for {own.beat - culprit.beat:.1f} s"
    return f"the run hangs: rank {culprit.rank} on {culprit.host} is behind, {where}."


def _place(frame: FrameType | None) -> str:
    """Where a thread is, as 'engine.py:160 global_norm, in all_reduce': our innermost line, and the innermost call."""
    names = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "megagpt" in path.parts and "site-packages" not in path.parts:
            here = f"{path.name}:{frame.f_lineno} {frame.f_code.co_name}"
            return f"{here}, in {names[0]}" if names else here
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names[0] if names else "its end"


def _waiting(frame: FrameType | None) -> bool:
    """Whether the innermost lines of a thread belong to torch's collectives, or to DeepSpeed's calls of them."""
    for _ in range(3):
        if frame is None:
            return False
        if Path(frame.f_code.co_filename).name in ("distributed_c10d.py", "c10d_logger.py"):
            return True
        frame = frame.f_back
    return False
