"""The files of tensors: safetensors, written in one pass that hashes as it goes, and read a box at a time.

A file is 8 bytes (little-endian length of the header), the header (JSON: name -> dtype, shape, range of bytes), and
the tensors' bytes in row-major order. Hashing runs beside reading or writing in a thread of its own, since both let
Python's lock go: the slower of the two sets the pace, and neither adds to the other.
"""

from __future__ import annotations

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


Hash = xxhash.xxh3_128
"""The hash of files: about as fast as memory is copied."""


def hashed(chunks: Iterable[bytes | memoryview], digest: Hash) -> Iterator[bytes | memoryview]:
    """`chunks` as they are; each is hashed while the next one is made and the consumer uses this one."""
    with ThreadPoolExecutor(1, thread_name_prefix="hash") as pool:
        pending: Future[None] | None = None
        for chunk in chunks:
            if pending is not None:
                pending.result()
            pending = pool.submit(digest.update, chunk)
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
        length = int.from_bytes(self._bytes(0, 8), "little")
        if length > (folder.size(name) or 0):
            raise ValueError(f"{folder}/{name} says that its header has {length:,} bytes")
        self._header: dict[str, Any] = json.loads(bytes(self._bytes(8, length)))
        self._data = 8 + length

    def fill(self, target: Tensor, key: str, box: Box) -> None:
        """Copy a box of the tensor `key` into `target`, which has its size: whole rows are read, and no others."""
        entry = self._header[key]
        shape, (start, stop) = entry["shape"], entry["data_offsets"]
        if entry["dtype"] != "F32" or stop - start != math.prod(shape) * _ITEM:
            raise ValueError(f"{self._folder}/{self._name}: {key} is not fp32 of the shape {shape}")
        row = math.prod(shape[1:]) * _ITEM
        first, rows = (box.start[0], box.size[0]) if shape else (0, 1)
        begin = self._data + start + first * row
        plain = target.device.type == "cpu" and target.dtype == torch.float32 and target.is_contiguous()
        if plain and list(box.size[1:]) == list(shape[1:]):  # straight to its place
            self._folder.read_into(self._name, begin, target.detach().view(-1).numpy().data.cast("B"))
            return
        found = torch.frombuffer(self._bytes(begin, rows * row), dtype=torch.float32)
        part = found.view(rows, *shape[1:])[(slice(None), *box.slices()[1:])] if shape else found.view(())
        target.copy_(part)

    def _bytes(self, start: int, count: int) -> bytearray:
        buffer = bytearray(count)
        self._folder.read_into(self._name, start, memoryview(buffer))
        return buffer
