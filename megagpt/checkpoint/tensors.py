"""The files of tensors: safetensors, written in one pass that hashes as it goes, and read a box at a time.

A file is 8 bytes (little-endian length of the header), the header (JSON: name -> dtype, shape, range of bytes), and
the tensors' bytes in row-major order. Hashing runs beside reading or writing in a thread of its own, since both let
Python's lock go: the slower of the two sets the pace, and neither adds to the other.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import xxhash
from torch import Tensor

from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.folders import CHUNK, Folder

_ITEM = 4  # bytes of an fp32 number
_LONGEST_HEADER = 1 << 30


class Hashes:
    """Of a stream of bytes: xxh3_128, which a load checks, and SHA-256, which nobody can forge."""

    def __init__(self, *, forgeable: bool = False) -> None:
        self._fast = xxhash.xxh3_128()
        self._strong = None if forgeable else hashlib.sha256()

    def update(self, chunk: bytes | memoryview) -> None:
        self._fast.update(chunk)
        if self._strong is not None:
            self._strong.update(chunk)

    def to_dict(self) -> dict[str, str]:
        found = {"xxh3_128": self._fast.hexdigest()}
        return found if self._strong is None else {**found, "sha256": self._strong.hexdigest()}


def hashed(chunks: Iterable[bytes | memoryview], hashes: Hashes) -> Iterator[bytes | memoryview]:
    """`chunks` as they are; each is hashed while the next one is made and the consumer uses this one."""
    with ThreadPoolExecutor(1, thread_name_prefix="hash") as pool:
        pending: Future[None] | None = None
        for chunk in chunks:
            if pending is not None:
                pending.result()
            pending = pool.submit(hashes.update, chunk)
            yield chunk
        if pending is not None:
            pending.result()


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


class TensorFile:
    """A file of fp32 tensors, open for reading. Raises ValueError if its header is not one."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name = folder, name
        length = int.from_bytes(folder.read(name, start=0, stop=8), "little")
        if length > _LONGEST_HEADER:
            raise ValueError(f"{folder}/{name} has a header of {length:,} bytes")
        self._header: dict[str, Any] = json.loads(bytes(folder.read(name, start=8, stop=8 + length)))
        self._data = 8 + length

    def read(self, key: str, box: Box) -> Tensor:
        """A box of the tensor `key`: the whole rows that it touches are read, and nothing else."""
        entry = self._header[key]
        shape, (start, stop) = entry["shape"], entry["data_offsets"]
        if entry["dtype"] != "F32" or stop - start != math.prod(shape) * _ITEM:
            raise ValueError(f"{self._folder}/{self._name}: {key} is not fp32 of the shape {shape}")
        if not shape:
            return self._floats(start, stop).view(())
        row = math.prod(shape[1:]) * _ITEM
        first, rows = box.start[0], box.size[0]
        part = self._floats(start + first * row, start + (first + rows) * row).view(rows, *shape[1:])
        return part[(slice(None), *box.slices()[1:])]

    def _floats(self, start: int, stop: int) -> Tensor:
        data = self._folder.read(self._name, start=self._data + start, stop=self._data + stop)
        return torch.frombuffer(data, dtype=torch.float32) if len(data) else torch.empty(0)
