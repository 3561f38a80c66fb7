"""The node's cache: content-addressed files in one folder, shared by every process of the node, within a limit.

KEY        a whole file that was checked; its modification time says when it was last asked for
KEY.part   one that is being downloaded, at its full size from the beginning, so that room is taken before it is used
KEY.bad    a download that failed its check: kept for whoever wants to know, and the first to go
used       bytes in the folder, under an exclusive flock; counted anew whenever room is made, so a killed process
           costs no more than an early count

All locks are flocks on open files, which end with their process however it dies. A reader holds a shared one on the
file (a pin), a downloader an exclusive one on KEY.part; the others wait for it and find KEY, or the lock free and
begin again. Room is made by unlinking what was unused the longest and is not pinned. Files are renamed into place
without fsync: after a power cut one may be short or wrong, and each process therefore checks a file at first use.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megagpt.errors import UserError

_POLL_SECONDS = 0.02
_SPARE = 0.1  # of the limit, freed beyond what is needed, so that the folder is seldom listed
_DOWNLOADS = 3  # of one file that fail their check before it counts as broken in the store

Download = Callable[[int], None]  # writes the file to this descriptor, from its beginning
Check = Callable[[Path], bool]


class Corrupt(Exception):
    """A file that fails its check however often it is fetched; `path` is what came last."""

    def __init__(self, key: str, path: Path) -> None:
        self.path = path
        super().__init__(f"{key} failed its check {_DOWNLOADS} times")


class Held:
    """A file of the cache, safe from eviction as long as this object lives."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        weakref.finalize(self, os.close, descriptor)


@dataclass(frozen=True)
class _File:
    path: Path
    size: int
    used_at: float


class Cache:
    """The files of a folder, `limit` bytes at most. `patience`: seconds to wait for room that others pin."""

    def __init__(self, folder: Path, limit: int, *, patience: float = 60.0) -> None:
        self.folder, self.limit, self.patience = folder, limit, patience
        self.faults = 0  # downloads that failed their check
        self._checked: set[str] = set()
        self._mutex = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache = {folder} cannot be made: {error}.", "Name another folder.") from error

    def hold(self, key: str, size: int, download: Download, check: Check) -> Held:
        """The file `key`, downloaded by one process if it is not there. Raises Corrupt, or UserError for no room."""
        if size > self.limit:
            raise self._too_small(size)
        failures = 0
        while True:
            held = self._found(key, size, check)
            if held is not None:
                return held
            part = _locked(self.folder / f"{key}.part")
            if part is None:
                time.sleep(_POLL_SECONDS)
                continue
            path = self.folder / f"{key}.part"
            try:
                if (self.folder / key).exists():  # another process was faster
                    continue
                self._take_room(size, part, path)
                download(part)
                if check(path):
                    path.rename(self.folder / key)
                    with self._mutex:
                        self._checked.add(key)
                    continue
                failures += 1
                self._set_aside(path, key)
                if failures == _DOWNLOADS:
                    raise Corrupt(key, self.folder / f"{key}.bad")
            finally:
                if _still_there(path, part):  # renamed, the name may be another downloader's by now
                    path.unlink()
                os.close(part)

    def _found(self, key: str, size: int, check: Check) -> Held | None:
        path = self.folder / key
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        held = Held(path, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits for an eviction, which is short
        if not _still_there(path, descriptor):
            return None
        with self._mutex:
            checked = key in self._checked
        if not checked or os.fstat(descriptor).st_size != size:
            if os.fstat(descriptor).st_size != size or not check(path):
                self._set_aside(path, key)
                return None
            with self._mutex:
                self._checked.add(key)
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
        return held

    def _set_aside(self, path: Path, key: str) -> None:
        with self._mutex:
            self.faults += 1
            self._checked.discard(key)
        with contextlib.suppress(FileNotFoundError):  # another process was as quick
            path.rename(self.folder / f"{key}.bad")

    def _take_room(self, size: int, part: int, path: Path) -> None:
        """Make room for `size` bytes and give them to the open file `part`."""
        os.ftruncate(part, 0)
        deadline = time.monotonic() + self.patience
        while True:
            with self._accounts() as used:
                fits = used.bytes + size <= self.limit or self._evict(used, size, keep=path)
                if fits and self._allocated(part, size, used, keep=path):
                    used.bytes += size
                    return
            if time.monotonic() > deadline:
                raise self._too_small(size)
            time.sleep(_POLL_SECONDS)

    def _allocated(self, part: int, size: int, used: _Used, *, keep: Path) -> bool:
        """Whether the disk gave the bytes, if need be after everything that is not in use was evicted."""
        for _ in range(2):
            try:
                os.posix_fallocate(part, 0, max(1, size))
                os.ftruncate(part, size)
                return True
            except OSError as error:
                os.ftruncate(part, 0)
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                self._evict(used, self.limit, keep=keep)
        raise UserError(
            f"the disk of data.cache = {self.folder} is full: {size:,} more bytes do not fit.",
            "Free some space there, or name a folder on another disk with --data.cache.",
        )

    def _evict(self, used: _Used, size: int, *, keep: Path) -> bool:
        """Unlink what is not pinned, the longest unused first; whether `size` bytes fit within the limit now."""
        files = sorted(self._files(), key=lambda file: (file.path.suffix != ".bad", file.used_at))
        used.bytes = sum(file.size for file in files if file.path != keep)
        goal = max(0, self.limit - size - int(_SPARE * self.limit))
        for file in files:
            if used.bytes <= goal:
                break
            if file.path != keep and _unlinked(file.path):
                used.bytes -= file.size
        return used.bytes + size <= self.limit

    def _files(self) -> Iterator[_File]:
        for entry in os.scandir(self.folder):
            if entry.name != "used" and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    yield _File(Path(entry.path), status.st_size, status.st_mtime)

    @contextlib.contextmanager
    def _accounts(self) -> Iterator[_Used]:
        """The bytes in use, for this process alone; what the block makes of them is kept."""
        descriptor = os.open(self.folder / "used", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            text = os.pread(descriptor, 32, 0)
            used = _Used(int(text) if text.strip().isdigit() else self.limit)
            yield used
            os.pwrite(descriptor, b"%-32d" % used.bytes, 0)
        finally:
            os.close(descriptor)

    def _too_small(self, size: int) -> UserError:
        return UserError(
            f"data.cache_gib = {self.limit / 2**30:.3g} is too little: {size:,} bytes more are needed at once, "
            "and all the rest is in use.",
            "Raise data.cache_gib.",
        )


@dataclass
class _Used:
    bytes: int


def _locked(path: Path) -> int | None:
    """The file, opened and locked for this downloader alone; None if there is another. A dead one holds no lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    if _still_there(path, descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _still_there(path: Path, descriptor: int) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _unlinked(path: Path) -> bool:
    """Unlink a file unless somebody holds it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
