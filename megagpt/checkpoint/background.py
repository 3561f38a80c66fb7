"""Save while the next steps run: a copy of the rank's state in host memory, written by a thread.

    begin     copy the state into buffers that are kept from save to save; a thread hashes and writes them
    settle    at every step's end: have all ranks written? then rank 0's thread commits; is that done? then it is over

No thread ever calls a collective: what threads found is agreed at the ends of steps, by all ranks, with one number.
So a failure on one rank surfaces on all of them at the same step, and the commit is never early. There is at most one
save at a time, and at most one copy of the state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
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
        if [buffer.shape for buffer in self._buffers] != [value.shape for value in values]:
            pin = any(value.is_cuda for value in values)
            self._buffers = [torch.empty(value.shape, dtype=torch.float32, pin_memory=pin) for value in values]
        for buffer, value in zip(self._buffers, values, strict=True):
            buffer.copy_(value.detach(), non_blocking=True)
        if any(value.is_cuda for value in values):
            torch.cuda.synchronize()
        buffers = iter(self._buffers)
        return [dataclasses.replace(part, **{kind: next(buffers) for kind in KINDS}) for part in owned]

    def bytes(self) -> int:
        """What it occupies."""
        return sum(buffer.nbytes for buffer in self._buffers)


class BackgroundSave:
    """One save in progress, on this rank. All ranks must begin, settle and finish it together."""

    def __init__(
        self, folder: Folder, owned: Sequence[Slice], *, header: dict[str, Any], rank: int, ranks: int
    ) -> None:
        """Begin to write `owned`, which nobody may change until the save is over."""
        self.folder = folder
        self._rank = rank
        self._phase: Literal["parts", "commit"] = "parts"
        self._commit: Callable[[], None] = lambda: commit(folder, header, ranks) if rank == 0 else None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._work: Future[None] = self._pool.submit(write_part, folder, owned, rank)

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
