"""Copies of the state on the nodes themselves: often and fast, for the case that ranks die and disks stay.

    checkpoint.local/RUN/gen-0001/step-000000070/rank-00003.safetensors    what rank 3 holds, as in a checkpoint's file
    checkpoint.local/RUN/gen-0001/step-000000070/rank-00003.json           hash, boxes and the run's state; the commit

Each rank writes what it holds on its own node, and sends it to the rank with the same place on the next node, which
writes it there: after the loss of any one node, or of several that are no neighbours, everything is still there. The
files of tensors come first. When all ranks have agreed that both copies of every one of them are durable, each
describes those on its node, so a description stands for a state that was once whole; then all but the last two are
deleted. `lineage` decides as for checkpoints, by the same generations, so that nobody goes on from a zombie's copies.

A load needs the same layout: every rank finds the same boxes. It takes its own file, or else gets it over the process
group from whichever rank has a copy. All of it happens in the training thread, since threads call no collectives.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from megagpt.checkpoint import lineage
from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.folders import CHUNK, Folder, folder_at, sealed, unsealed
from megagpt.checkpoint.lineage import Commit
from megagpt.checkpoint.load import fault_in_file
from megagpt.checkpoint.save import bytes_of, description_of, index_of, tensors_of, together, write_tensors
from megagpt.checkpoint.tensors import Hash, TensorFile, Wanted, hashed
from megagpt.errors import UserError
from megagpt.files import write_whole
from megagpt.parallel.ranks import gpu_present, lowest_over_ranks, wrapping_sums_over_ranks
from megagpt.parallel.state import Slice

KEPT = 2
_STEP_BITS = 40


def node_name() -> str:
    """What tells this rank's node from others."""
    return socket.gethostname()


class LocalCopies:
    """One rank's part in them. All ranks must make one, and call its methods together."""

    def __init__(self, local: str, out: Path, *, rank: int, ranks: int) -> None:
        """In the folder `local` of each node, for the run in the folder `out`.

        Raises UserError if nodes have different numbers of ranks.
        """
        self._rank, self._ranks = rank, ranks
        self._root = folder_at(Path(local) / f"{_run_number(out, rank):016x}")
        nodes: dict[int, list[int]] = {}
        for other, node in enumerate(self._of_every_rank(xxhash.xxh3_64_intdigest(node_name().encode()))):
            nodes.setdefault(node, []).append(other)
        groups = list(nodes.values())
        if len({len(group) for group in groups}) > 1:
            raise UserError(
                f"checkpoint.local needs as many ranks on each node; they have {[len(group) for group in groups]}.",
                "Start as many on each, or leave checkpoint.local empty.",
            )
        own = next(number for number, group in enumerate(groups) if rank in group)
        at = groups[own].index(rank)
        self.nodes = len(groups)
        self._first_here = at == 0
        self._next = groups[(own + 1) % self.nodes][at]
        self._previous = groups[own - 1][at]

    def save(self, held: Sequence[Slice], header: dict[str, Any], *, generation: int, step: int) -> str | None:
        """Keep `held` here and on the next node. Returns None, or on every rank why not; older copies then stay."""
        folder = lineage.commit_folder(self._root, generation, step)
        described: dict[int, dict[str, Any]] = {}

        def write() -> None:
            folder.require_space(min(self.nodes, 2) * bytes_of(held) + 2**20)
            described[self._rank] = {"part": write_tensors(folder, self._rank, held), "header": header}

        def copy() -> None:
            described[self._previous] = self._hand_over(
                folder, described[self._rank], to=self._next, source=self._previous
            )

        def describe() -> None:
            for rank, description in described.items():
                folder.write(description_of(rank), [sealed(description)])

        for work in (write, copy, describe) if self.nodes > 1 else (write, describe):
            failure = together(work, self._rank, self._ranks)
            if failure is not None:
                if self._first_here:
                    folder.delete()
                return failure
        if self._first_here:
            for old in lineage.steps_in(self._root)[:-KEPT]:
                lineage.commit_folder(self._root, *old).delete()
        return None

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
        for needy, has in enumerate(self._of_every_rank(int(whole))):
            if has:
                continue
            offered = self._rank != needy and _intact(folder, needy)
            giver = lowest_over_ranks(self._rank if offered else self._ranks)
            if giver == self._ranks:
                return False
            description = _description(folder.read(description_of(needy))) if self._rank == giver else {}
            ends = {"to": needy if self._rank == giver else None, "source": giver if self._rank == needy else None}
            try:
                description = self._hand_over(folder, description, **ends)
                if self._rank == needy:
                    folder.write(description_of(needy), [sealed(description)])
            except OSError:
                continue  # this node has no room for it: the copy is not used, as all ranks will agree
        return bool(lowest_over_ranks(int(whole or _intact(folder, self._rank, index))))

    def _hand_over(
        self, folder: Folder, description: dict[str, Any], *, to: int | None, source: int | None
    ) -> dict[str, Any]:
        """Send rank `to` the file that is described, and write the one that `source` sends; returns its description.

        Every rank must call it, if only to look on. Raises OSError, after all is sent, if the file was not written.
        """
        text, part = sealed(description), description.get("part", {})
        theirs = b"".join(self._exchange(iter([memoryview(bytearray(text))]), len(text), to=to, source=source))
        size = part.get("bytes", 0)
        content = _whatever(folder.chunks(part["file"]) if to is not None else iter(()), size)
        stream = self._exchange(content, size, to=to, source=source)
        if source is None:
            for _ in stream:
                pass
            return {}
        received, digest = _description(theirs), Hash()
        try:
            folder.write(received["part"]["file"], hashed(stream, digest))
        finally:
            for _ in stream:  # whatever became of the writing, the other rank has to get rid of it
                pass
        if digest.hexdigest() != received["part"]["xxh3_128"]:
            raise OSError(f"{folder}/{received['part']['file']} has changed on its way from rank {source}")
        return received

    def _exchange(
        self, content: Iterator[memoryview], size: int, *, to: int | None, source: int | None
    ) -> Iterator[memoryview]:
        """Send rank `to` the `size` bytes of `content`, in parts of CHUNK, and yield what rank `source` sends.

        Every rank must use it up.
        """
        device = "cuda" if gpu_present() else "cpu"
        sizes = self._of_every_rank(size)
        going, coming = size if to is not None else 0, sizes[source] if source is not None else 0
        for start in range(0, max(going, coming), CHUNK):
            operations, incoming = [], None
            if start < going:
                outgoing = torch.frombuffer(next(content), dtype=torch.uint8).to(device)
                operations.append(dist.P2POp(dist.isend, outgoing, to))
            if start < coming:
                incoming = torch.empty(min(CHUNK, coming - start), dtype=torch.uint8, device=device)
                operations.append(dist.P2POp(dist.irecv, incoming, source))
            for work in dist.batch_isend_irecv(operations):
                work.wait()
            if incoming is not None:
                yield incoming.cpu().numpy().data

    def _of_every_rank(self, value: int) -> list[int]:
        """The unsigned 64-bit values of all ranks, by rank."""
        return wrapping_sums_over_ranks([value if other == self._rank else 0 for other in range(self._ranks)])


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


def _whatever(chunks: Iterator[memoryview], size: int) -> Iterator[memoryview]:
    """`size` bytes, of `chunks` as far as they can be read: the rank that gets them waits, and checks their hash."""
    sent = 0
    try:
        for part in chunks:
            yield part
            sent += len(part)
    except OSError:
        pass
    for start in range(sent, size, CHUNK):
        yield memoryview(bytearray(min(CHUNK, size - start)))
