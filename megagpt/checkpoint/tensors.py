"""The files of tensors: safetensors, written in one pass that hashes as it goes, and read a box at a time.

A file is 8 bytes (little-endian length of the header), the header (JSON: name -> dtype, shape, range of bytes), and
the tensors' bytes in row-major order. Hashing runs beside reading or writing in a thread of its own, since both let
Python's lock go: the slower of the two sets the pace, and neither adds to the other.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from megagpt.checkpoint.boxes import Box, overlap
from megagpt.checkpoint.folders import AHEAD, CHUNK, Folder, uninitialised

_ITEM = 4  # bytes of an fp32 number


Hash = xxhash.xxh3_128
"""The hash of files: about as fast as memory is copied."""


def hashed(chunks: Iterable[bytes | memoryview], digest: Hash) -> Iterator[bytes | memoryview]:
    """`chunks` as they are; each is hashed while later ones are made, and before the one after `AHEAD` others is."""
    with ThreadPoolExecutor(1, thread_name_prefix="hash") as pool:
        pending: deque[Future[None]] = deque()
        for chunk in chunks:
            pending.append(pool.submit(digest.update, chunk))
            yield chunk
            if len(pending) > AHEAD:
                pending.popleft().result()
        for hashing in pending:
            hashing.result()


def file_chunks(tensors: Sequence[tuple[str, Tensor]]) -> Iterator[bytes | memoryview]:
    """The bytes of a file of fp32 tensors; of what is not on the CPU, one tensor at a time is copied there."""
    header, offset = {}, 0
    for name, tensor in tensors:
        stop = offset + tensor.numel() * _ITEM
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in tensors:
        flat = tensor.detach().to("cpu", torch.float32).contiguous().view(-1)
        data = flat.numpy().data.cast("B")
        for start in range(0, len(data), CHUNK):
            yield data[start : start + CHUNK]


@dataclass(frozen=True)
class Wanted:
    """A box of a tensor in a file, and where it is to go: a tensor of the box's size."""

    target: Tensor
    key: str
    box: Box


class TensorFile:
    """A file of fp32 tensors, open for reading. Raises ValueError if its header is not one."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name = folder, name
        start = self._bytes(0, 8)
        length = int.from_bytes(start, "little")
        if length > (folder.size(name) or 0):
            raise ValueError(f"{folder}/{name} says that its header has {length:,} bytes")
        self._head = start + self._bytes(8, length)
        self._header: dict[str, Any] = json.loads(self._head[8:])

    def fill(self, wanted: Iterable[Wanted]) -> None:
        """Copy boxes to their targets: whole rows are read, and no others."""
        for rows in self._plan(wanted):
            for _ in self._read(rows):
                pass

    def chunks(self, wanted: Iterable[Wanted]) -> Iterator[bytes | memoryview]:
        """The file's content in order, a part at a time; on the way boxes are copied to their targets.

        A part is valid until `AHEAD` more have been taken. No byte is read twice. Raises ValueError, KeyError
        or TypeError at once if the header is not that of a file with these boxes.
        """
        return self._chunks(self._plan(wanted))

    def _chunks(self, plan: Sequence[_Rows]) -> Iterator[bytes | memoryview]:
        yield self._head
        at = len(self._head)
        for rows in plan:
            yield from self._folder.chunks(self._name, at, rows.start)
            yield from self._read(rows)
            at = rows.stop
        yield from self._folder.chunks(self._name, at)

    def _plan(self, wanted: Iterable[Wanted]) -> list[_Rows]:
        """The rows to read of each tensor of which something is wanted, in the file's order."""
        by_key: dict[str, list[Wanted]] = defaultdict(list)
        for item in wanted:
            by_key[item.key].append(item)
        return sorted((self._rows(key, items) for key, items in by_key.items()), key=lambda rows: rows.start)

    def _rows(self, key: str, wanted: list[Wanted]) -> _Rows:
        entry = self._header[key]
        shape, (start, stop) = entry["shape"], entry["data_offsets"]
        if entry["dtype"] != "F32" or stop - start != math.prod(shape) * _ITEM:
            raise ValueError(f"{self._folder}/{self._name}: {key} is not fp32 of the shape {shape}")
        whole = Box((0,) * len(shape), tuple(shape))
        if any(len(item.box.start) != len(shape) or overlap(item.box, whole) != item.box for item in wanted):
            raise ValueError(f"{self._folder}/{self._name}: {key} has the shape {shape}, too small for what it holds")
        row, begin = math.prod(shape[1:]) * _ITEM, len(self._head) + start
        first = min(item.box.start[0] for item in wanted) if shape else 0
        last = max(item.box.start[0] + item.box.size[0] for item in wanted) if shape else 1
        return _Rows(begin + first * row, begin + last * row, first, tuple(shape), wanted)

    def _read(self, rows: _Rows) -> Iterator[memoryview]:
        """The bytes of some rows, each part as soon as it is there; in the end the boxes have been filled."""
        place = rows.place()
        buffer = uninitialised(rows.stop - rows.start) if place is None else place
        for start in range(0, len(buffer), CHUNK):
            part = buffer[start : start + CHUNK]
            self._folder.read_into(self._name, rows.start + start, part)
            yield part
        if place is None:
            rows.hand_out(buffer)

    def _bytes(self, start: int, count: int) -> bytes:
        buffer = bytearray(count)
        self._folder.read_into(self._name, start, memoryview(buffer))
        return bytes(buffer)


@dataclass(frozen=True)
class _Rows:
    """The bytes [start, stop) of a file: whole rows of one tensor, from row `first` on, and what is wanted of them."""

    start: int
    stop: int
    first: int
    shape: tuple[int, ...]
    """Of the whole tensor in the file."""
    wanted: list[Wanted]

    def place(self) -> memoryview | None:
        """The memory that these bytes belong into as they are, if there is such a place."""
        target, box = self.wanted[0].target, self.wanted[0].box
        plain = target.device.type == "cpu" and target.dtype == torch.float32 and target.is_contiguous()
        if len(self.wanted) > 1 or not plain or box.size[1:] != self.shape[1:]:
            return None
        return target.detach().view(-1).numpy().data.cast("B")

    def hand_out(self, buffer: memoryview) -> None:
        """Copy from `buffer`, which has these bytes, to the targets."""
        numbers = torch.frombuffer(buffer, dtype=torch.float32)
        for item in self.wanted:
            if not self.shape:
                item.target.copy_(numbers.view(()))
                continue
            rows = numbers.view(-1, *self.shape[1:])
            first = item.box.start[0] - self.first
            item.target.copy_(rows[(slice(first, first + item.box.size[0]), *item.box.slices()[1:])])
