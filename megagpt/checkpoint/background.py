"""Save while the next steps run: a copy of the rank's state in host memory, made and written by a thread.

    begin     a thread copies the state into buffers that are kept from save to save, then hashes and writes them
    copied    the next update of the state waits for the copy; forward and backward passes only read it, and do not
    settle    at every step's end: have all ranks done their part? then the next phase begins, such as rank 0's commit

No thread ever calls a collective: what threads found is agreed at the ends of steps, by all ranks, with one number.
So a failure on one rank surfaces on all of them at the same step, and the commit is never early. There is at most one
save of a kind at a time, and at most one copy of the state for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from megagpt.checkpoint.folders import Folder
from megagpt.checkpoint.save import KINDS, commit, not_written, write_part
from megagpt.errors import UserError
from megagpt.parallel.ranks import lowest_over_ranks, rank, world_size
from megagpt.parallel.state import Slice

_BUSY, _DONE = 0, 1
"""Below them, rank - ranks: the rank that failed."""


class HostCopy:
    """A copy of a rank's slices in memory that is allocated once; on a machine with a GPU, page-locked."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def take(self, owned: Sequence[Slice]) -> list[Slice]:
        """Copies of `owned`, valid until the next call."""
        values = [getattr(part, kind) for part in owned for kind in KINDS]
        devices = {value.device for value in values if value.is_cuda}
        if [buffer.shape for buffer in self._buffers] != [value.shape for value in values]:
            self._buffers = [
                torch.empty(value.shape, dtype=torch.float32, pin_memory=bool(devices)) for value in values
            ]
        with _beside_training(devices):
            for buffer, value in zip(self._buffers, values, strict=True):
                buffer.copy_(value.detach(), non_blocking=True)
        buffers = iter(self._buffers)
        return [dataclasses.replace(part, **{kind: next(buffers) for kind in KINDS}) for part in owned]

    def bytes(self) -> int:
        """What it occupies."""
        return sum(buffer.nbytes for buffer in self._buffers)


@contextlib.contextmanager
def _beside_training(devices: set[torch.device]) -> Iterator[None]:
    """Copies from a GPU that begin here go on their own stream, beside training's kernels, and end with the block."""
    if not devices:
        yield
        return
    (device,) = devices
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


class Snapshot:
    """A copy of a rank's state that a thread will make; nobody may change the state before `wait` has returned."""

    def __init__(self, state: Sequence[Slice], copy: HostCopy) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the last update has been launched, and is over now
        self._state, self._copy = state, copy
        self._copied = threading.Event()
        self.seconds = 0.0
        """What the copy took, once it is made."""

    def take(self) -> list[Slice]:
        """Make the copy."""
        began = time.perf_counter()
        try:
            return self._copy.take(self._state)
        finally:
            self.seconds = time.perf_counter() - began
            self._copied.set()

    def wait(self) -> None:
        """Wait until the state may change again."""
        self._copied.wait()


class Failed(Exception):
    """A phase failed on some rank. Raised on all of them."""

    def __init__(self, words: str, *, here: bool) -> None:
        super().__init__(words)
        self.here = here
        """Whether it failed on this rank, which alone knows why."""


class Phases:
    """Work of a thread on every rank, in phases: the next begins when all ranks have done the one before.

    What stands between two phases is done in the training thread, and may be a collective. All ranks must make one,
    settle and finish it together.
    """

    def __init__(self, phases: Iterator[Callable[[], None]]) -> None:
        self._phases = phases
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._work: Future[None] = self._pool.submit(next(phases))

    def settle(self) -> bool:
        """Whether the last phase is done everywhere; does not wait. Raises Failed on all ranks if one failed."""
        problem = self._work.exception() if self._work.done() else None
        if problem is not None and not isinstance(problem, OSError | UserError):
            raise problem  # a fault of ours: this rank ends with it, and the launcher ends the others
        ranks = world_size()
        agreed = lowest_over_ranks(rank() - ranks if problem else _DONE if self._work.done() else _BUSY)
        if agreed < 0:
            self._pool.shutdown()
            words = str(problem) if problem else f"rank {agreed + ranks} failed, see its message"
            raise Failed(words, here=problem is not None)
        if agreed == _BUSY:
            return False
        following = next(self._phases, None)
        if following is None:
            self._pool.shutdown()
            return True
        self._work = self._pool.submit(following)
        return False

    def wait(self) -> None:
        """Wait until this rank has done its phase."""
        wait([self._work])


class BackgroundSave:
    """One save of a checkpoint in progress, on this rank. All ranks must begin, settle and finish it together."""

    def __init__(
        self,
        folder: Folder,
        owned: Sequence[Slice],
        copy: HostCopy,
        *,
        header: dict[str, Any],
        rank: int,
        ranks: int,
    ) -> None:
        """Begin to copy and write `owned`, which nobody may change before `copied.wait` has returned."""
        self.folder = folder
        self.copied = Snapshot(owned, copy)

        def write() -> None:
            write_part(folder, self.copied.take(), rank)

        def conclude() -> None:
            if rank == 0:
                commit(folder, header, ranks)

        self._phases = Phases(iter([write, conclude]))

    def settle(self) -> bool:
        """Whether the checkpoint is committed; does not wait. Raises UserError on all ranks if one of them failed."""
        try:
            return self._phases.settle()
        except Failed as failed:
            raise not_written(self.folder, str(failed)) from None

    def finish(self) -> None:
        """Wait until the checkpoint is committed. Raises UserError on all ranks if one of them failed."""
        done = False
        while not done:
            self._phases.wait()
            done = self.settle()
