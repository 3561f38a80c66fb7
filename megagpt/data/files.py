"""Files that are whole or absent: atomic writes, hashes, and the small binary tables beside the shards.

A table is a safetensors file (huggingface.co/docs/safetensors, format) with one metadata key, `megagpt`, that holds
canonical JSON. Tables are read through a memory map: opening one costs its header, whatever its size.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors.numpy import save

_DTYPES = {"U8": np.uint8, "I64": np.int64, "U16": np.uint16, "U32": np.uint32}


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name only once it is complete and on the disk."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    with atomic_file(path) as file:
        file.write(content)


def sync_folder(folder: Path) -> None:
    """Make the renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Delete what killed writers left behind in `folder`."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value that hashes are taken of: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def table_bytes(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> bytes:
    """The bytes of a table; equal input gives equal bytes."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return save(contiguous, metadata={"megagpt": canonical_json(metadata).decode()})


def read_table(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays (views of a memory map) and metadata of a table. Raises ValueError if the file is not one."""
    try:
        content = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
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
