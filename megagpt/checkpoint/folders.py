"""Where checkpoints live: a folder of this machine's file system, or of an object store such as s3://.

Both keep one promise, and the commit rests on it alone: a file is either whole and durable under its name, or absent.
A file system gets there by a temporary name, fsync, rename and fsync of the folder. An object store has no rename and
needs none: an upload appears when its last request succeeds, and never in part.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megagpt.config import Checkpoint
from megagpt.errors import UserError
from megagpt.files import read_further_ahead, require_space, start_writeback, sync_folder, whole

CHUNK = 1 << 24
AHEAD = 2
"""Chunks that a reader of files may keep while it asks for the next one."""


class Folder(ABC):
    """A folder that need not exist: writing makes it. Failures of any kind of storage are OSErrors."""

    @abstractmethod
    def __truediv__(self, name: str) -> Folder: ...

    @abstractmethod
    def names(self) -> list[str]:
        """What is directly inside, files and folders, sorted; nothing if it does not exist."""

    @abstractmethod
    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Make the file `name` of `chunks`, whole and durable, in place of an older one."""

    @abstractmethod
    def create(self, name: str, content: bytes) -> bool:
        """Write `name` whole unless it exists; of several that try, one is told that it did."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of the file `name`, or None if there is no such file."""

    @abstractmethod
    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of a file from `start` on. Raises OSError if there are fewer."""

    @abstractmethod
    def delete_file(self, name: str) -> None:
        """Delete a file, if it is there."""

    @abstractmethod
    def delete(self) -> None:
        """Delete the folder with all that is inside."""

    @abstractmethod
    def require_space(self, needed: int) -> None:
        """Raise UserError unless `needed` more bytes fit."""

    def require_writable(self) -> None:
        """Raise UserError unless files can be written here, by writing one."""
        name = f"writable.{os.uname().nodename}.{os.getpid()}"
        try:
            self.write(name, [b""])
            self.delete_file(name)
        except OSError as error:
            raise UserError(
                f"{self} cannot be written: {error}.", "Choose another folder with --checkpoint.folder or --out."
            ) from error

    def chunks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[memoryview]:
        """The bytes [start, stop) of a file, without `stop` to its end, a part at a time.

        A part is valid until `AHEAD` more have been taken.
        """
        stop = (self.size(name) or 0) if stop is None else stop
        size = min(max(0, stop - start), CHUNK)
        buffers = [uninitialised(size) for _ in range(1 + AHEAD)]  # used again: new memory costs a copy
        for number, at in enumerate(range(start, stop, CHUNK)):
            part = buffers[number % len(buffers)][: stop - at]
            self.read_into(name, at, part)
            yield part

    def read(self, name: str) -> bytes:
        """The whole content of a small file. Raises OSError if there is none."""
        size = self.size(name)
        if size is None:
            raise FileNotFoundError(f"{self}/{name} is missing")
        buffer = bytearray(size)
        self.read_into(name, 0, memoryview(buffer))
        return bytes(buffer)

    def exists(self, name: str) -> bool:
        return self.size(name) is not None


def folder_at(place: Path | str) -> Folder:
    """The folder at a path, or at a URL such as s3://bucket/folder (needs the extra 's3')."""
    return _ObjectFolder.at(place) if "://" in str(place) else _LocalFolder(Path(place))


def checkpoints_of(checkpoint: Checkpoint, out: Path) -> Folder:
    """Where the run in the folder `out` keeps its checkpoints."""
    return folder_at(checkpoint.folder or out / "checkpoints")


class _LocalFolder(Folder):
    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def __truediv__(self, name: str) -> Folder:
        return _LocalFolder(self._path / name)

    def names(self) -> list[str]:
        try:
            return sorted(os.listdir(self._path))  # noqa: PTH208 - names, not paths
        except (FileNotFoundError, NotADirectoryError):
            return []

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        self._make()
        with whole(self._path / name) as temporary:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                at = 0
                for chunk in chunks:
                    rest = memoryview(chunk)
                    while rest:
                        rest = rest[os.write(descriptor, rest) :]
                    start_writeback(descriptor, at, len(chunk))
                    at += len(chunk)
            finally:
                os.close(descriptor)

    def create(self, name: str, content: bytes) -> bool:
        self._make()
        temporary = self._path / f".{name}.{os.getpid()}.tmp"
        try:
            temporary.write_bytes(content)
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            os.link(temporary, self._path / name)  # fails if it exists, and appears whole
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(self._path)
        return True

    def _make(self) -> None:
        """Make the folder, so that it survives a power cut."""
        if not self._path.is_dir():
            missing = [parent for parent in self._path.parents if not parent.is_dir()]
            self._path.mkdir(parents=True, exist_ok=True)
            for folder in (self._path, *missing):
                sync_folder(folder.parent)

    def size(self, name: str) -> int | None:
        path = self._path / name
        return path.stat().st_size if path.is_file() else None

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        descriptor = os.open(self._path / name, os.O_RDONLY)
        try:
            read_further_ahead(descriptor)
            done = 0
            while done < len(buffer):
                count = os.preadv(descriptor, [buffer[done:]], start + done)
                if not count:
                    raise OSError(f"{self._path / name} ends {len(buffer) - done:,} bytes too early")
                done += count
        finally:
            os.close(descriptor)

    def delete_file(self, name: str) -> None:
        (self._path / name).unlink(missing_ok=True)

    def delete(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._path)

    def require_space(self, needed: int) -> None:
        self._make()
        require_space(self._path, needed, "a checkpoint")


class _ObjectFolder(Folder):
    def __init__(self, system: Any, path: str, scheme: str) -> None:
        self._system, self._path, self._scheme = system, path.rstrip("/"), scheme

    @staticmethod
    def at(url: Path | str) -> Folder:
        import fsspec

        text = str(url)
        scheme = text.partition("://")[0]
        try:
            system, path = fsspec.core.url_to_fs(text, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UserError(f"{text} cannot be opened: {error}.", "pip install 'megagpt[s3]' reads s3://.") from error
        return _ObjectFolder(system, path, scheme)

    def __str__(self) -> str:
        return f"{self._scheme}://{self._path}"

    def __truediv__(self, name: str) -> Folder:
        return _ObjectFolder(self._system, f"{self._path}/{name}", self._scheme)

    def names(self) -> list[str]:
        with _as_os_errors():
            try:
                found = self._system.ls(self._path, detail=False)
            except FileNotFoundError:
                return []
            return sorted({path.rstrip("/").rsplit("/", 1)[-1] for path in found if path.strip("/") != self._path})

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        with _as_os_errors():
            stream = self._system.open(f"{self._path}/{name}", "wb")
            try:
                for chunk in chunks:
                    stream.write(bytes(chunk))
            except BaseException:
                stream.discard()
                stream.closed = True  # or its destructor would complete the upload
                raise
            stream.close()

    def create(self, name: str, content: bytes) -> bool:
        with _as_os_errors():
            try:
                self._system.pipe_file(f"{self._path}/{name}", content, mode="create")  # one conditional request
            except FileExistsError:
                return False
            return True

    def size(self, name: str) -> int | None:
        with _as_os_errors():
            try:
                found = self._system.info(f"{self._path}/{name}")
            except FileNotFoundError:
                return None
            return int(found["size"]) if found["type"] == "file" else None

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        if not len(buffer):
            return
        with _as_os_errors():
            found = self._system.cat_file(f"{self._path}/{name}", start=start, end=start + len(buffer))
        if len(found) != len(buffer):
            raise OSError(f"{self}/{name} ends {len(buffer) - len(found):,} bytes too early")
        buffer[:] = found

    def delete_file(self, name: str) -> None:
        with _as_os_errors(), contextlib.suppress(FileNotFoundError):
            self._system.rm_file(f"{self._path}/{name}")

    def delete(self) -> None:
        with _as_os_errors(), contextlib.suppress(FileNotFoundError):
            self._system.rm(self._path, recursive=True)

    def require_space(self, needed: int) -> None:
        """An object store does not say how much it holds."""


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """Clients of object stores raise many kinds of errors; for their callers they are all a failure of storage."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def uninitialised(size: int) -> memoryview:
    """Writable memory that nobody has cleared first."""
    import numpy as np

    return np.empty(size, dtype=np.uint8).data


_PREFIX = '{{"xxh3_128": "{}", '
_PREFIX_BYTES = len(_PREFIX.format("0" * 32))


def sealed(content: dict[str, Any]) -> bytes:
    """JSON whose first key is the hash of all bytes after that key, so that no change to it goes unnoticed."""
    import xxhash

    rest = json.dumps(content)[1:].encode()
    return _PREFIX.format(xxhash.xxh3_128(rest).hexdigest()).encode() + rest


def unsealed(data: bytes) -> dict[str, Any]:
    """What `sealed` wrote. Raises ValueError if a byte differs."""
    import xxhash

    prefix, rest = data[:_PREFIX_BYTES], data[_PREFIX_BYTES:]
    if prefix != _PREFIX.format(xxhash.xxh3_128(rest).hexdigest()).encode():
        raise ValueError("it has changed since it was written (xxh3_128)")
    return json.loads(data)
