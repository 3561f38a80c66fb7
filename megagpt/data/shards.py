"""One shard: a plain tar of token blocks that stays valid WebDataset, and the index that makes it random access.

Tar (USTAR, uncompressed, times and owners fixed): for block 0, 1, ... the members
    {block:09d}.doclens.npy   uint32 [documents of the block]: tokens of each, its end of text included
    {block:09d}.tokens.npy    uint16 or uint32 [tokens of the block]: the documents end to end
A block holds whole documents, up to `block_tokens` tokens; a longer document has a block of its own.
Index (a table, see tables.py) `X.index` beside `X.tar`; n blocks, m documents, positions count tokens of the shard:
    block_offset   int64  [n]     byte offset in the tar of the block's first token
    block_start    int64  [n+1]   tokens before each block; the last entry is the shard's tokens
    block_document int64  [n+1]   documents before each block
    block_crc32    uint32 [n]     zlib's crc32 of the block's token bytes
    document_end   uint32 [m]     tokens up to and with each document's end
    metadata {"format": "megagpt index 1", "dtype": "uint16" | "uint32"}
Cost: 1.6 % over the raw tokens for the tar (documents of 800); 4 bytes a document and 28 a block for the index.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from megagpt.data.tables import mapped, read_table, sha256_of, table_bytes
from megagpt.files import whole, write_whole

BLOCK_TOKENS = 1 << 16
_FORMAT = "megagpt index 1"
_TAR_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """What the manifest says of a shard. `name` has no suffix: NAME.tar and NAME.index are its files."""

    name: str
    split: str
    tokens: int
    documents: int
    blocks: int
    tar_bytes: int
    tar_sha256: str
    index_bytes: int
    index_sha256: str


class _Tee:
    """A binary file that counts and hashes what passes through."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.size += len(content)
        self.digest.update(content)
        return self.file.write(content)


class ShardWriter:
    """Appends documents to one shard. Made by `open_shard`; `entry` once that context has closed."""

    def __init__(self, file: BinaryIO, *, dtype: np.dtype, block_tokens: int) -> None:
        self.dtype, self.block_tokens = dtype, block_tokens
        self.tokens = 0
        self._block: list[np.ndarray] = []
        self._block_size = 0
        self._blocks: list[_Block] = []
        self._tee = _Tee(file)

    def add(self, document: np.ndarray) -> None:
        """Append a document, its end of text included."""
        if self._block and self._block_size + len(document) > self.block_tokens:
            self._flush()
        self._block.append(document)
        self._block_size += len(document)
        self.tokens += len(document)

    def _flush(self) -> None:
        lengths = np.array([len(document) for document in self._block], dtype="<u4")
        tokens = np.concatenate(self._block).astype(self.dtype, copy=False)
        payload = 0
        for suffix, array in (("doclens", lengths), ("tokens", tokens)):
            content = _npy(array)
            self._tee.write(_header(f"{len(self._blocks):09d}.{suffix}.npy", len(content)))
            self._tee.write(content)
            payload = self._tee.size - array.nbytes
            self._tee.write(bytes(-len(content) % _TAR_BLOCK))
        self._blocks.append(_Block(payload, zlib.crc32(tokens.data), len(tokens), lengths))
        self._block, self._block_size = [], 0

    def finish(self) -> None:
        if self._block:
            self._flush()
        self._tee.write(bytes(2 * _TAR_BLOCK))  # the end of a tar, which is whole records long
        self._tee.write(bytes(-self._tee.size % tarfile.RECORDSIZE))

    def entry(self, folder: Path, name: str, split: str) -> ShardEntry:
        """Write the index of the finished tar, and describe both."""
        index = _index_bytes(self._blocks, self.dtype)
        write_whole(folder / f"{name}.index", index)
        return ShardEntry(
            name=name,
            split=split,
            tokens=self.tokens,
            documents=sum(len(block.lengths) for block in self._blocks),
            blocks=len(self._blocks),
            tar_bytes=self._tee.size,
            tar_sha256=self._tee.digest.hexdigest(),
            index_bytes=len(index),
            index_sha256=sha256_of(index),
        )


@contextmanager
def open_shard(folder: Path, name: str, *, dtype: np.dtype, block_tokens: int) -> Iterator[ShardWriter]:
    """Write folder/NAME.tar: whole when the context closes, absent when it fails."""
    with whole(folder / f"{name}.tar") as temporary, temporary.open("wb") as file:
        writer = ShardWriter(file, dtype=dtype, block_tokens=block_tokens)
        yield writer
        writer.finish()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _header(name: str, size: int) -> bytes:
    """What stands before a member: the bytes of webdataset's TarWriter, whose import costs torch's."""
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.uname, member.gname = size, 0o444, "megagpt", "megagpt"
    return member.tobuf(tarfile.USTAR_FORMAT)


@dataclass(frozen=True)
class _Block:
    offset: int
    crc32: int
    tokens: int
    lengths: np.ndarray


def _index_bytes(blocks: list[_Block], dtype: np.dtype) -> bytes:
    lengths = np.concatenate([np.zeros(0, np.uint32), *(block.lengths for block in blocks)])
    arrays = {
        "block_offset": np.array([block.offset for block in blocks], dtype=np.int64),
        "block_start": np.cumsum([0, *(block.tokens for block in blocks)], dtype=np.int64),
        "block_document": np.cumsum([0, *(len(block.lengths) for block in blocks)], dtype=np.int64),
        "block_crc32": np.array([block.crc32 for block in blocks], dtype=np.uint32),
        "document_end": np.cumsum(lengths, dtype=np.uint32),
    }
    return table_bytes(arrays, {"format": _FORMAT, "dtype": dtype.name})


def rebuilt_index(tar: Path) -> bytes:
    """The bytes of a shard's index, found again by scanning its tar. Raises ValueError if the tar is broken."""
    blocks: list[_Block] = []
    dtype = np.dtype("<u2")
    try:
        with tarfile.open(tar, "r:") as archive:
            members = iter(archive)
            for member in members:
                lengths = _load(archive, member, ".doclens.npy")
                member = next(members, member)
                tokens = _load(archive, member, ".tokens.npy")
                dtype = tokens.dtype
                if lengths.sum() != len(tokens):
                    raise ValueError(f"block {len(blocks)} has {len(tokens)} tokens, its documents {lengths.sum()}")
                payload = member.offset_data + member.size - tokens.nbytes
                blocks.append(_Block(payload, zlib.crc32(tokens.tobytes()), len(tokens), lengths))
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(f"{tar} is not a shard of whole blocks: {error}") from error
    return _index_bytes(blocks, dtype)


def _load(archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> np.ndarray:
    if not member.name.endswith(suffix):
        raise ValueError(f"member {member.name} stands where a {suffix} belongs")
    content = cast(BinaryIO, archive.extractfile(member)).read()
    return np.load(io.BytesIO(content), allow_pickle=False)


class Shard:
    """An open shard: its tokens as one row, with the seams between blocks hidden.

    Its small tables are memory views: bisect on one is five times faster than numpy's searchsorted for one number.
    """

    def __init__(self, folder: Path, entry: ShardEntry, dtype: np.dtype) -> None:
        index = checked_index(folder / f"{entry.name}.index", entry, dtype)
        self.document_ends = index["document_end"].data
        self.block_crc32 = index["block_crc32"]
        self._block_start = index["block_start"].data
        self._first = (index["block_offset"] // dtype.itemsize).data
        self._content = mapped(folder / f"{entry.name}.tar", dtype)  # payloads are 64-byte aligned

    def copy(self, start: int, out: np.ndarray) -> None:
        """out[:] = the shard's tokens from `start` on."""
        while True:
            block = bisect_right(self._block_start, start) - 1
            here = self._block_start[block + 1] - start
            first = self._first[block] + start - self._block_start[block]
            if here >= len(out):
                out[:] = self._content[first : first + len(out)]
                return
            out[:here] = self._content[first : first + here]
            start, out = start + here, out[here:]

    def bad_blocks(self) -> Iterator[int]:
        """Blocks whose tokens do not have the crc32 that the index gives."""
        for block, (first, crc32) in enumerate(zip(self._first, self.block_crc32, strict=True)):
            size = self._block_start[block + 1] - self._block_start[block]
            if zlib.crc32(self._content[first : first + size].tobytes()) != crc32:
                yield block


def checked_index(path: Path, entry: ShardEntry, dtype: np.dtype) -> Mapping[str, np.ndarray]:
    """The index, after its hash: a flipped bit in it would silently move every token after it."""
    if sha256_of(path.read_bytes()) != entry.index_sha256:
        raise ValueError(f"{path} is not the index that the manifest describes")
    arrays, metadata = read_table(path)
    if metadata != {"format": _FORMAT, "dtype": dtype.name}:
        raise ValueError(f"{path} has the format {metadata}")
    return arrays
