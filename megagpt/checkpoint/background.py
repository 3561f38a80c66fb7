"""Save while the next steps run: a copy of the rank's state in host memory, made and written by a thread.

    begin     a thread copies the state into buffers that are kept from save to save, then hashes and writes them
    copied    the next update of the state waits for the copy; forward and backward passes only read it, and do not
    settle    at every step's end: have all ranks written? then rank 0's thread commits; is that done? then it is over

No thread ever calls a collective: what threads found is agreed at the ends of steps, by all ranks, with one number.
So a failure on one rank surfaces on all of them at the same step, and the commit is never early. There is at most one
save at a time, and at most one copy of the state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Literal

import torch
from torch import Tensor

from megagpt.checkpoint.folders import Folder
from megagpt.checkpoint.save import KINDS, commit, not_written, write_part
from megagpt.errors import UserError
from megagpt.parallel.ranks import lowest_over_ranks
from megagpt.parallel.state import Slice

_FAILED, _BUSY, _DONE = 0, 1, 2


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


class BackgroundSave:
    """One save in progress, on this rank. All ranks must begin, settle and finish it together."""

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
        """Begin to copy and write `owned`, which nobody may change before `wait_for_copy` has returned."""
        self.folder = folder
        self.copy_seconds = 0.0
        """What the copy took, once it is made."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the last update has been launched, and is over now
        self._owned, self._copy, self._rank = owned, copy, rank
        self._copied = threading.Event()
        self._phase: Literal["parts", "commit"] = "parts"
        self._commit: Callable[[], None] = lambda: commit(folder, header, ranks) if rank == 0 else None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._work: Future[None] = self._pool.submit(self._write)

    def _write(self) -> None:
        began = time.perf_counter()
        try:
            copies = self._copy.take(self._owned)
        finally:
            self.copy_seconds = time.perf_counter() - began
            self._copied.set()
        write_part(self.folder, copies, self._rank)

    def wait_for_copy(self) -> None:
        """Wait until the state may change again."""
        self._copied.wait()

    def settle(self) -> bool:
        """Whether the checkpoint is committed; does not wait. Raises UserError on all ranks if one of them failed."""
        problem = self._work.exception() if self._work.done() else None
        if problem is not None and not isinstance(problem, OSError | UserError):
            raise problem  # a fault of ours: this rank ends with it, and the launcher ends the others
        state = _FAILED if problem else _DONE if self._work.done() else _BUSY
        agreed = lowest_over_ranks(state)
        if agreed == _FAILED:
            self._pool.shutdown()
            raise not_written(self.folder, str(problem) if problem else "another rank failed, see its message")
        if agreed == _DONE and self._phase == "parts":
            self._phase = "commit"
            self._work = self._pool.submit(self._commit)
            return False
        if agreed == _DONE:
            self._pool.shutdown()
        return agreed == _DONE

    def finish(self) -> None:
        """Wait until the checkpoint is committed."""
        while True:
            wait([self._work])
            if self.settle():
                return
