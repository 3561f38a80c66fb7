"""Small binary tables beside the shards, and the JSON that hashes are taken of.

A table is a safetensors file (huggingface.co/docs/safetensors, format) with one metadata key, `megagpt`, that holds
canonical JSON. Tables are read through a memory map: opening one costs its header, whatever its size.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

_DTYPES = {"I64": np.int64, "U32": np.uint32}


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value that hashes are taken of: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def table_bytes(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> bytes:
    """The bytes of a table; equal input gives equal bytes."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return save(contiguous, metadata={"megagpt": canonical_json(metadata).decode()})


class Preads:
    """A file as a flat array that is read and not mapped: the same slices, a system call and a copy each."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._file = path.open("rb", buffering=0)
        weakref.finalize(self, self._file.close)
        self.dtype = dtype

    def __getitem__(self, part: slice) -> np.ndarray:
        size = self.dtype.itemsize
        content = os.pread(self._file.fileno(), (part.stop - part.start) * size, part.start * size)
        return np.frombuffer(content, dtype=self.dtype)


def mapped(path: Path, dtype: np.dtype) -> np.ndarray | Preads:
    """A file as a flat array; reads instead where the system has no more maps to give (or the file system none)."""
    try:
        # A plain view: slicing np.memmap itself is four times slower.
        return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOMEM, errno.ENODEV):
            raise
        return Preads(path, dtype)


def read_table(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays (views of a memory map) and metadata of a table. Raises ValueError if the file is not one."""
    try:
        content = mapped(path, np.dtype(np.uint8))
        if isinstance(content, Preads):
            content = np.fromfile(path, dtype=np.uint8)
        start = 8 + int(content[:8].view("<u8")[0])
        header = json.loads(bytes(content[8:start]))
        metadata = json.loads(header.pop("__metadata__")["megagpt"])
        arrays = {}
        for name, spec in header.items():
            first, last = spec["data_offsets"]
            array = content[start + first : start + last].view(_DTYPES[spec["dtype"]])
            arrays[name] = array.reshape(spec["shape"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a megagpt table: {error!r}") from error
    return arrays, metadata
