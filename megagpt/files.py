"""Files that are either whole or absent: written under another name, synced, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megagpt.errors import UserError


def sync_folder(folder: Path) -> None:
    """Make the names inside `folder` survive a power cut: renames and new files are only safe after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start_writeback(descriptor: int, start: int, size: int) -> None:
    """Have the disk begin with these bytes of a file, just written, so that its sync has less left to do.

    Linux begins to write what is declared to be of no further use; as long as it does, the pages stay in the cache.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)


def read_further_ahead(descriptor: int) -> None:
    """Have the system read twice as far ahead as it would, in a file that is read from front to back (Linux)."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`: what the block writes there becomes `path` at its end, or nothing does."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write `content` to `path`, atomically and durably."""
    with whole(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def sha256(path: Path) -> str:
    """The file's SHA-256, as hex digits."""
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 22):
            digest.update(block)
        return digest.hexdigest()


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise UserError unless the file system of `folder` has `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{what} needs {needed / 2**30:,.2f} GiB in {folder}, and {free / 2**30:,.2f} GiB are free.",
            "Free some space, or choose another folder with --out.",
        )
