"""Copies of the state on the nodes themselves: often and fast, for the case that ranks die and disks stay.

    checkpoint.local/RUN/gen-0001/step-000000070/rank-00003.safetensors    what rank 3 holds, as in a checkpoint's file
    checkpoint.local/RUN/gen-0001/step-000000070/rank-00003.json           hash, boxes and the run's state; the commit

Each rank writes what it holds on its own node, and sends it to the rank with the same place on the next node, which
writes it there: after the loss of any one node, or of several that are no neighbours, everything is still there. The
files of tensors come first. When all ranks have agreed that both copies of every one of them are durable, each
describes those on its node, so a description stands for a state that was once whole; then all but the last two are
deleted. `lineage` decides as for checkpoints, by the same generations, so that nobody goes on from a zombie's copies.

With checkpoint.asynchronous a thread copies the state into host memory and writes the files (`background`), as the
next steps run. Only the transfer between nodes is done in the training thread, since threads call no collectives.

A load needs the same layout: every rank finds the same boxes. It takes its own file, or else gets it over the process
group from whichever rank has a copy.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megagpt.checkpoint import lineage
from megagpt.checkpoint.background import Failed, Phases
from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.folders import Folder, folder_at, sealed, unsealed
from megagpt.checkpoint.lineage import Commit
from megagpt.checkpoint.load import fault_in_file
from megagpt.checkpoint.ring import Ring
from megagpt.checkpoint.save import bytes_of, description_of, index_of, tensors_of, write_tensors
from megagpt.checkpoint.tensors import Hash, TensorFile, Wanted, hashed
from megagpt.files import write_whole
from megagpt.parallel.ranks import lowest_over_ranks, wrapping_sums_over_ranks
from megagpt.parallel.state import Slice

KEPT = 2
_STEP_BITS = 40


class LocalCopies:
    """One rank's part in them. All ranks must make one, and call its methods together."""

    def __init__(self, local: str, out: Path, *, rank: int, ranks: int) -> None:
        """In the folder `local` of each node, for the run in the folder `out`.

        Raises UserError if nodes have different numbers of ranks.
        """
        self._rank, self._ranks = rank, ranks
        self._root = folder_at(Path(local) / f"{_run_number(out, rank):016x}")
        self._ring = Ring(rank=rank, ranks=ranks)
        self.nodes = self._ring.nodes

    def begin(
        self, held: Callable[[], Sequence[Slice]], header: dict[str, Any], *, generation: int, step: int
    ) -> LocalSave:
        """Begin to keep here and on the next node what `held` gives; a thread will ask for it, at once."""
        folder = lineage.commit_folder(self._root, generation, step)
        return LocalSave(folder, self._phases(folder, held, header), self._ring)

    def _phases(
        self, folder: Folder, held: Callable[[], Sequence[Slice]], header: dict[str, Any]
    ) -> Iterator[Callable[[], None]]:
        """Write this rank's file, the one of the node before, and the two descriptions, the commit."""
        ring, described = self._ring, dict[int, dict[str, Any]]()

        def write() -> None:
            state = held()
            folder.require_space(min(ring.nodes, 2) * bytes_of(state) + 2**20)
            described[ring.rank] = {"part": write_tensors(folder, ring.rank, state), "header": header}

        def describe() -> None:
            for rank, description in described.items():
                folder.write(description_of(rank), [sealed(description)])

        def forget() -> None:
            for old in lineage.steps_in(self._root)[:-KEPT] if ring.first_here else ():
                lineage.commit_folder(self._root, *old).delete()

        yield write
        if ring.nodes > 1:
            theirs, content = ring.hand_over(folder, described[ring.rank], to=ring.next, source=ring.previous)
            described[ring.previous] = theirs
            yield lambda: _keep(folder, theirs, content)
        yield describe
        yield forget

    def load(self, held: Sequence[Slice], shared: Folder) -> tuple[Commit, dict[str, Any]] | None:
        """Fill `held` from the newest copies that fit and are no older than what `shared` has, if there are any.

        Returns where they are from, and the run's state. Without any, `held` is as it was.
        """
        below = 2**63 - 1
        while True:
            found = [number << _STEP_BITS | step for number, step in lineage.steps_in(self._root)]
            below = -lowest_over_ranks(-max((code for code in found if code < below), default=0))
            if not below:
                return None
            generation, step = below >> _STEP_BITS, below & (1 << _STEP_BITS) - 1
            counts = self._rank > 0 or _counts(shared, generation, step)
            if not lowest_over_ranks(int(counts)):
                continue
            folder = lineage.commit_folder(self._root, generation, step)
            if self._gather(folder, index_of(held)):
                description = _description(folder.read(description_of(self._rank)))
                wanted = [
                    Wanted(tensor, key, Box((0,) * tensor.dim(), tuple(tensor.shape)))
                    for key, tensor in tensors_of(held)
                ]
                TensorFile(folder, description["part"]["file"]).fill(wanted)
                return Commit(generation, step, folder), description["header"]

    def _gather(self, folder: Folder, index: list[dict[str, Any]]) -> bool:
        """Have every rank's file on its own node, if there is an undamaged copy of each somewhere; whether it is."""
        whole = _intact(folder, self._rank, index)
        for needy, has in enumerate(self._ring.of_every_rank(int(whole))):
            if has:
                continue
            offered = self._rank != needy and _intact(folder, needy)
            giver = lowest_over_ranks(self._rank if offered else self._ranks)
            if giver == self._ranks:
                return False
            description = _description(folder.read(description_of(needy))) if self._rank == giver else {}
            ends = {"to": needy if self._rank == giver else None, "source": giver if self._rank == needy else None}
            description, content = self._ring.hand_over(folder, description, **ends)
            if self._rank == needy:
                with contextlib.suppress(OSError):  # no room here: the copy is not used, as all ranks will agree
                    _keep(folder, description, content)
                    folder.write(description_of(needy), [sealed(description)])
        return bool(lowest_over_ranks(int(whole or _intact(folder, self._rank, index))))


class LocalSave:
    """One save of the nodes' copies in progress. All ranks must settle it together."""

    def __init__(self, folder: Folder, phases: Iterator[Callable[[], None]], ring: Ring) -> None:
        self._folder, self._ring, self._phases = folder, ring, Phases(phases)

    def settle(self) -> bool:
        """Whether it is over; does not wait. Raises Failed on all ranks if one failed; older copies then stay."""
        try:
            return self._phases.settle()
        except Failed:
            if self._ring.first_here:
                self._folder.delete()
            raise

    def wait(self) -> None:
        """Wait for what this rank's thread is doing; there may be more to do when all have settled that."""
        self._phases.wait()


def _keep(folder: Folder, description: dict[str, Any], content: Sequence[memoryview]) -> None:
    """Write the file that another rank has sent. Raises OSError if that fails, or it is not what is described."""
    part, digest = description["part"], Hash()
    folder.write(part["file"], hashed(iter(content), digest))
    if digest.hexdigest() != part["xxh3_128"]:
        raise OSError(f"{folder}/{part['file']} has changed on its way here")


def _run_number(out: Path, rank: int) -> int:
    """What tells the copies of the run in `out` from those of others, also of one that was in this folder before."""
    number, path = 0, out / "local-copies.id"
    if rank == 0:
        if path.exists():
            number = int(path.read_text(), 16)
        else:
            number = secrets.randbits(64)
            write_whole(path, f"{number:016x}\n")
    return wrapping_sums_over_ranks([number])[0]


def _counts(shared: Folder, generation: int, step: int) -> bool:
    """Whether copies of this step belong to the run's line, and are no older than its newest checkpoint."""
    newest = next(lineage.commits(shared), None)
    late = newest is None or (generation, step) >= (newest.generation, newest.step)
    return late and lineage.descends_from(shared, generation, step)


def _description(data: bytes) -> dict[str, Any]:
    """What a description says, without its seal. Raises ValueError if it is damaged."""
    content = unsealed(data)
    return {"part": content["part"], "header": content["header"]}


def _intact(folder: Folder, rank: int, index: list[dict[str, Any]] | None = None) -> bool:
    """Whether a rank's file is here, undamaged, and with `index` holds these boxes."""
    try:
        part = _description(folder.read(description_of(rank)))["part"]
    except (OSError, ValueError):
        return False
    return (index is None or part["boxes"] == index) and fault_in_file(folder, part) is None
