"""Files that ranks hand to each other over the process group, and which node comes after which."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from megagpt.checkpoint.folders import CHUNK, Folder, sealed, unsealed
from megagpt.errors import UserError
from megagpt.parallel.ranks import gpu_present, wrapping_sums_over_ranks


def node_name() -> str:
    """What tells this rank's node from others."""
    return socket.gethostname()


class Ring:
    """The nodes in the order of their first ranks, the first after the last. All ranks must make one, and call its
    methods together.
    """

    def __init__(self, *, rank: int, ranks: int) -> None:
        """Raises UserError if nodes have different numbers of ranks."""
        self.rank, self.ranks = rank, ranks
        nodes: dict[int, list[int]] = {}
        for other, node in enumerate(self.of_every_rank(xxhash.xxh3_64_intdigest(node_name().encode()))):
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
        self.first_here = at == 0
        self.next = groups[(own + 1) % self.nodes][at]
        self.previous = groups[own - 1][at]

    def hand_over(
        self, folder: Folder, description: dict[str, Any], *, to: int | None, source: int | None
    ) -> tuple[dict[str, Any], list[memoryview]]:
        """Send rank `to` the file of `folder` that is described; returns what `source` sends, nothing without one.

        What cannot be read is sent as something else: whoever gets it compares its hash.
        """
        text = sealed(description)
        theirs = b"".join(self._exchange(iter([memoryview(bytearray(text))]), len(text), to=to, source=source))
        size = description["part"]["bytes"] if to is not None else 0
        content = _whatever(folder.chunks(description["part"]["file"]) if to is not None else iter(()), size)
        received = list(self._exchange(content, size, to=to, source=source))
        return (unsealed(theirs), received) if source is not None else ({}, [])

    def of_every_rank(self, value: int) -> list[int]:
        """The unsigned 64-bit values of all ranks, by rank."""
        return wrapping_sums_over_ranks([value if other == self.rank else 0 for other in range(self.ranks)])

    def _exchange(
        self, content: Iterator[memoryview], size: int, *, to: int | None, source: int | None
    ) -> Iterator[memoryview]:
        """Send rank `to` the `size` bytes of `content`, in parts of CHUNK, and yield what rank `source` sends."""
        device = "cuda" if gpu_present() else "cpu"
        sizes = self.of_every_rank(size)
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
