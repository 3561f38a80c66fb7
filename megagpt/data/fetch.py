"""Shards that lie in a store, read through the node's cache and fetched ahead in the order of need.

Whole shards (`data.remote = "shards"`) are checked against their sha256 when complete and then mapped. Single blocks
("blocks") are ranged reads, checked against their crc32 on arrival: 128 KB instead of a shard for a sequence, for
corpora that the cache does not hold. Indices come whole, checked against their sha256. A file that fails its check is
set aside and fetched again, three times in all; a shard that still fails is read by blocks, so that only the broken
block itself is lost: it stops the run, with its name, or by data.bad_block another sequence is read (substitute.py).
Threads fetch what the coming steps need. Whoever needs a thing now takes it over from their queue.
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megagpt.data.cache import Cache, Corrupt, Held
from megagpt.data.shards import Shard, ShardEntry, checked_index
from megagpt.data.store import Store
from megagpt.data.tables import Preads, mapped
from megagpt.errors import UserError
from megagpt.files import sha256

THREADS = 16  # a request takes 20-100 ms, most of it waiting
AHEAD_BYTES = 64 << 20  # what may be asked for before it is needed, of blocks
_PART = 16 << 20  # bytes of one request for a whole shard
_LIVE_BLOCKS = 2 * AHEAD_BYTES

Key = tuple[Any, ...]


class BadBlock(UserError):
    """A block that is broken in the store itself: the tokens [first, stop) of a split of the corpus."""

    def __init__(self, rule: str, *, corpus: str, block: int, first: int, stop: int) -> None:
        super().__init__(rule, f"{RESTORE} Or train without it: --data.bad_block substitute.")
        self.corpus, self.block, self.first, self.stop = corpus, block, first, stop


class _Job:
    """Something to get once, by whichever thread comes first."""

    def __init__(self, size: int, load: Callable[[], Any]) -> None:
        self.size = size
        self._load = load
        self._begun = threading.Lock()
        self._done = threading.Event()
        self._value: Any = None
        self.error: Exception | None = None

    def run(self) -> None:
        """Do it, unless it is done or another thread is at it."""
        if not self._begun.acquire(blocking=False):
            return
        try:
            self._value = self._load()
        except Exception as error:  # whoever asks for the value gets it
            self.error = error
        self._done.set()

    def value(self) -> Any:
        self.run()
        self._done.wait()
        if self.error is not None:
            raise self.error
        return self._value


class Fetched:
    """Values by key, the newest `limit` bytes of them kept; `ask` has threads get them, `get` waits."""

    def __init__(self, limit: int, threads: int = THREADS) -> None:
        self.limit = limit
        self._jobs: OrderedDict[Key, _Job] = OrderedDict()
        self._bytes = 0
        self._mutex = threading.Lock()
        self._threads = threads  # to be started, with the first thing asked for
        self._queue: queue.SimpleQueue[weakref.ref[_Job] | None] = queue.SimpleQueue()

    def _start(self) -> None:
        for _ in range(self._threads):
            threading.Thread(target=_work, args=(self._queue,), name="megagpt-fetch", daemon=True).start()
            weakref.finalize(self, self._queue.put, None)
        self._threads = 0

    def ask(self, key: Key, size: int, load: Callable[[], Any]) -> int:
        """Have it fetched; the bytes that this asked for anew."""
        if key in self._jobs:
            return 0
        if self._threads:
            self._start()
        self._queue.put(weakref.ref(self._job(key, size, load)))
        return size

    def get(self, key: Key, size: int, load: Callable[[], Any]) -> Any:
        job = self._job(key, size, load)
        try:
            return job.value()
        except Exception:
            with self._mutex:  # asked again, it is tried again
                if self._jobs.get(key) is job:
                    self._bytes -= self._jobs.pop(key).size
            raise

    def _job(self, key: Key, size: int, load: Callable[[], Any]) -> _Job:
        with self._mutex:
            job = self._jobs.get(key)
            if job is None:
                job = self._jobs[key] = _Job(size, load)
                self._bytes += size
            self._jobs.move_to_end(key)
            while self._bytes > self.limit and len(self._jobs) > 1:
                self._bytes -= self._jobs.popitem(last=False)[1].size
            return job


def _work(jobs: queue.SimpleQueue[weakref.ref[_Job] | None]) -> None:
    """Run jobs until None comes; those that nobody can ask for any more are left."""
    while (reference := jobs.get()) is not None:
        job = reference()
        if job is not None:
            job.run()


@dataclass(frozen=True)
class Remote:
    """Where a corpus's files come from, and what becomes of them."""

    store: Store
    cache: Cache
    mode: Literal["shards", "blocks"]
    fingerprint: str

    def index(self, entry: ShardEntry) -> Held:
        """The shard's index. Raises UserError if it is broken in the store."""
        return self._whole(f"{entry.name}.index", entry.index_bytes, entry.index_sha256)

    def tar(self, entry: ShardEntry) -> Held:
        """The whole shard. Raises Corrupt if it is broken in the store."""
        size = entry.tar_bytes
        return self.cache.hold(
            entry.tar_sha256,
            size,
            lambda descriptor: self._download(f"{entry.name}.tar", size, descriptor),
            lambda path: sha256(path) == entry.tar_sha256,
        )

    def _whole(self, name: str, size: int, digest: str) -> Held:
        try:
            return self.cache.hold(
                digest,
                size,
                lambda descriptor: self._download(name, size, descriptor),
                lambda path: sha256(path) == digest,
            )
        except Corrupt as error:
            raise UserError(f"{self.store.where(name)} is broken in the store: {error}.", RESTORE) from error

    def parts(self, name: str, size: int) -> Iterator[bytes]:
        """A file of so many bytes, a request at a time."""
        for start in range(0, size, _PART):
            yield self.store.read_range(name, start, min(start + _PART, size))

    def _download(self, name: str, size: int, descriptor: int) -> None:
        at = 0
        for part in self.parts(name, size):
            _write(descriptor, part, at)
            at += len(part)

    def block(self, entry: ShardEntry, number: int, start: int, stop: int, crc32: int) -> np.ndarray:
        """The bytes [start, stop) of the shard, which are its block `number`. Raises Corrupt if they are broken."""
        name = f"{entry.name}.tar"

        def download(descriptor: int) -> None:
            _write(descriptor, self.store.read_range(name, start, stop), 0)

        held = self.cache.hold(
            f"{entry.tar_sha256}-{number}",
            stop - start,
            download,
            lambda path: zlib.crc32(path.read_bytes()) == crc32,
        )
        return np.fromfile(held.path, dtype=np.uint8)


RESTORE = "Copy the file there again from a whole corpus, or build it again."


class RemoteShards:
    """The shards of a split, opened as they are needed."""

    def __init__(self, remote: Remote, entries: Sequence[ShardEntry], dtype: np.dtype) -> None:
        self.remote, self.entries, self.dtype = remote, entries, dtype
        self.starts = list(accumulate((entry.tokens for entry in entries), initial=0))
        self.blocks = Fetched(_LIVE_BLOCKS)
        self.tars = Fetched(remote.cache.limit // 2)

    def open(self, number: int) -> RemoteShard:
        return self.blocks.get(("index", number), 0, lambda: RemoteShard(self, number))

    def ask(self, number: int, start: int, stop: int) -> int:
        """Have the tokens [start, stop) of a shard fetched; about how many bytes of memory or cache that takes."""
        entry = self.entries[number]
        if self.remote.mode == "shards":
            return self.tars.ask(("tar", entry.name), entry.tar_bytes, lambda: self.tar(entry))
        size = max(1, entry.tokens // entry.blocks)
        key = ("touch", number, start // size, (stop - 1) // size)
        self.blocks.ask(key, 0, lambda: self.open(number).fetch(start, stop))
        return size * self.dtype.itemsize * ((stop - 1) // size - start // size + 1)

    def tar(self, entry: ShardEntry) -> tuple[Held, np.ndarray | Preads] | None:
        """The whole shard; None if it is broken in the store, where its blocks are read one by one."""
        try:
            held = self.remote.tar(entry)
        except Corrupt:
            return None
        return held, mapped(held.path, self.dtype)


class RemoteShard:
    """One of them: what Shard is to a local file."""

    def __init__(self, shards: RemoteShards, number: int) -> None:
        entry = shards.entries[number]
        held = shards.remote.index(entry)
        try:
            index = checked_index(held.path, entry, shards.dtype)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{shards.remote.store.where(entry.name)}.index cannot be read: {error}.", RESTORE
            ) from error
        self.document_ends = index["document_end"].data
        self.block_start = index["block_start"].data
        self._block_offset = index["block_offset"].data
        self._crc32 = index["block_crc32"].data
        self._shards, self._entry, self._first = shards, entry, shards.starts[number]

    def copy(self, start: int, out: np.ndarray) -> None:
        """out[:] = the shard's tokens from `start` on. Raises BadBlock."""
        for block, first, last in self._parts(start, start + len(out)):
            at = self.block_start[block] + first - start
            out[at : at + last - first] = self._tokens(block, first, last)

    def fetch(self, start: int, stop: int) -> None:
        """Bring the blocks of the tokens [start, stop) into memory."""
        for block, _, _ in self._parts(start, stop):
            self._block(block)

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(block, first, last token within it) of the tokens [start, stop)."""
        block = bisect_right(self.block_start, start) - 1
        while start < stop:
            first, last = self.block_start[block], min(stop, self.block_start[block + 1])
            yield block, start - first, last - first
            start, block = last, block + 1

    def _tokens(self, block: int, first: int, last: int) -> np.ndarray:
        entry, shards = self._entry, self._shards
        if shards.remote.mode == "shards":
            whole = shards.tars.get(("tar", entry.name), entry.tar_bytes, lambda: shards.tar(entry))
            if whole is not None:
                at = self._block_offset[block] // shards.dtype.itemsize
                return whole[1][at + first : at + last]
        return self._block(block)[first:last]

    def _block(self, block: int) -> np.ndarray:
        entry, shards = self._entry, self._shards
        start = self._block_offset[block]
        size = (self.block_start[block + 1] - self.block_start[block]) * shards.dtype.itemsize

        def load() -> np.ndarray:
            content = shards.remote.block(entry, block, start, start + size, self._crc32[block])
            return content.view(shards.dtype)

        try:
            return shards.blocks.get((entry.name, block), size, load)
        except Corrupt as error:
            first, stop = (self._first + self.block_start[number] for number in (block, block + 1))
            where = shards.remote.store.where(f"{entry.name}.tar")
            rule = f"block {block} of {where} is broken in the store: it fails its crc32."
            raise BadBlock(rule, corpus=shards.remote.fingerprint, block=block, first=first, stop=stop) from error


class LocalShards:
    """The shards of a split in a folder; nothing of them is ever asked for ahead."""

    def __init__(self, folder: Path, entries: Sequence[ShardEntry], dtype: np.dtype) -> None:
        self.folder, self.entries, self.dtype = folder, entries, dtype

    def open(self, number: int) -> Shard:
        """Raises UserError if the shard or its index cannot be read."""
        try:
            return Shard(self.folder, self.entries[number], self.dtype)
        except (OSError, ValueError) as error:
            raise UserError(f"a shard cannot be read: {error}.", REPAIR.format(folder=self.folder)) from error


REPAIR = "Run 'megagpt data verify {folder}' to see what is broken; copy those files again, or rebuild the corpus."


def _write(descriptor: int, content: bytes, at: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, at)
        view, at = view[written:], at + written
