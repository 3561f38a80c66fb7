"""Files under one URL, by fsspec: every request has a time-out, is hedged, retried within a budget, and never trusted.

Request.  `timeout` seconds each; if it has not answered after `hedge` seconds a second one is sent, and the first
          answer wins. A body of another length than was asked for counts as a failure.
Retry.    Transient failures only, after a pause drawn from [0, min(longest, first * 2**tries)] (exponential back-off
          with full jitter, so that a thousand ranks do not come back at once), until `budget` seconds have passed.
Errors.   What is missing, denied or not trusted is a UserError at once; a store that stays unreachable is
          Unreachable, which a launcher may try again. Messages hold no passwords and no query strings, where
          signatures travel.
Credentials are the store's own affair (environment, profile, instance role); they are never part of a corpus's URL,
which goes into run.toml. `pipe:` commands are refused: what runs a command is a program and not a setting.
"""

from __future__ import annotations

import asyncio
import random
import re
import ssl
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from megagpt.errors import UserError

T = TypeVar("T")
_CONNECTIONS = 64
_SPOKEN_FROM = 3  # tries of one read that fail before the console hears of it
_CLIENTS = {"aiobotocore", "aiohttp", "botocore", "gcsfs", "httpx", "huggingface_hub", "requests", "urllib3"}


class Unreachable(RuntimeError):
    """A store that did not answer within the budget."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a read may take, in seconds."""

    timeout: float = 30.0
    hedge: float = 4.0
    budget: float = 300.0
    first_pause: float = 0.1
    longest_pause: float = 15.0


@dataclass
class Traffic:
    """What a store was asked, and how it went."""

    reads: int = 0
    bytes: int = 0
    retries: int = 0
    hedged: int = 0


def is_url(location: str) -> bool:
    """Whether a corpus's location is a URL and not a folder."""
    return "://" in location or location.startswith("pipe:")


def check_url(url: str) -> None:
    """Raise UserError for a URL that no store serves, or that would carry a secret into the run's files."""
    if url.startswith("pipe:"):
        raise UserError(
            f"data.mixture names a command ('{url.split()[0]} ...'), and corpora are read from stores only.",
            "Name the folder's URL itself: s3://, gs://, hf:// or https://.",
        )
    parts = urlsplit(url)
    named = parts.username is not None and parts.scheme in ("http", "https")
    if parts.password is not None or named or parts.query or parts.fragment:
        raise UserError(
            f"the corpus {redacted(url)} has a password, a key or a query in its URL, which run.toml would keep.",
            "Leave them out; credentials come from the store's own environment variables, profile or role.",
        )


def redacted(text: str) -> str:
    """`text` without the user names, passwords and query strings of URLs."""
    return re.sub(r"(\w+://)[^/\s@]*@", r"\1", re.sub(r"(\w+://[^\s?'\"]*)\?[^\s'\")>]*", r"\1", text))


@dataclass
class Store:
    """The files below `url`. Not to be carried over a fork."""

    url: str
    patience: Patience = Patience()
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        check_url(self.url)
        self._files, self._root = _file_system(self.url)
        self._jitter = random.Random()  # its own: training must not see how the network was

    def where(self, name: str) -> str:
        """A file's URL, for messages."""
        return f"{redacted(self.url).rstrip('/')}/{name}"

    def read(self, name: str) -> bytes:
        """A whole file, of unknown size."""
        return self._patiently(name, lambda path: self._files._cat_file(path, start=0))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """The file's bytes [start, stop)."""

        async def request(path: str) -> bytes:
            content = await self._files._cat_file(path, start=start, end=stop)
            if len(content) != stop - start:
                raise EOFError(f"{len(content):,} bytes came where {stop - start:,} were asked for")
            return content

        return self._patiently(name, request)

    def size(self, name: str) -> int:
        """A file's bytes."""
        return self._patiently(name, self._files._info)["size"]

    def sizes(self) -> dict[str, int] | None:
        """The bytes of each file under the URL, by name; None where it cannot be listed (http)."""
        if urlsplit(self.url).scheme in ("http", "https"):
            return None
        found = self._patiently("", lambda path: self._files._ls(path, detail=True))
        return {item["name"].rstrip("/").rpartition("/")[2]: item["size"] or 0 for item in found}

    def _patiently(self, name: str, request: Callable[[str], Awaitable[T]]) -> T:
        path = f"{self._root}/{name}".rstrip("/")
        began = time.monotonic()
        self.traffic.reads += 1
        for tries in count(1):
            try:
                hedged = self._hedged(lambda: request(path))
                answer = asyncio.run_coroutine_threadsafe(hedged, self._files.loop).result()
                self.traffic.bytes += len(answer) if isinstance(answer, bytes) else 0
                return answer
            except Exception as error:
                kind = _kind(error)
                if kind is None:
                    raise
                reason = f"{type(error).__name__}: {redacted(str(error))}".rstrip(": ")
                if kind == "missing":
                    raise UserError(f"there is no {self.where(name)} ({reason}).", _MISSING) from None
                if kind == "denied":
                    raise UserError(f"{self.where(name)} may not be read ({reason}).", _DENIED) from None
                if kind == "untrusted":
                    raise UserError(
                        f"the server of {self.where(name)} is not trusted ({reason}).", _UNTRUSTED
                    ) from None
                bound = min(self.patience.longest_pause, self.patience.first_pause * 2.0 ** min(tries, 20))
                pause = self._jitter.uniform(0, bound)
                if time.monotonic() - began + pause > self.patience.budget:
                    what = f"{self.where(name)} could not be read in {self.patience.budget:g} s, {tries:,} tries"
                    raise Unreachable(f"{what} (data.patience); the last: {reason}") from None
            self.traffic.retries += 1
            if tries >= _SPOKEN_FROM:
                said = f"{self.where(name)}: try {tries} failed ({reason}), the next in {pause:.1f} s"
                print(f"megagpt: warning: {said}", file=sys.stderr, flush=True)
            time.sleep(pause)
        raise AssertionError("count() does not end")

    async def _hedged(self, request: Callable[[], Awaitable[T]]) -> T:
        """The first answer of a request and, if that is late, of a second one."""
        running = {asyncio.ensure_future(request())}
        every = set(running)
        deadline = time.monotonic() + self.patience.timeout
        error: BaseException = TimeoutError(f"no answer in {self.patience.timeout:g} s")
        try:
            while running:
                left = deadline - time.monotonic()
                wait = left if len(every) > 1 else min(left, self.patience.hedge)
                done, running = await asyncio.wait(
                    running, timeout=max(0.0, wait), return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    failure = task.exception()
                    if failure is None:
                        return task.result()
                    error = failure
                if not done and time.monotonic() >= deadline:
                    break
                if not done:
                    self.traffic.hedged += 1
                    running.add(asyncio.ensure_future(request()))
                    every |= running
            raise error
        finally:
            for task in every:
                task.cancel()
            await asyncio.gather(*every, return_exceptions=True)


_MISSING = "Check the URL, and that the corpus was copied whole."
_DENIED = "Check the credentials that the store's client finds (environment, profile, role), and their rights."
_UNTRUSTED = "Name the file of the authority that signed its certificate in SSL_CERT_FILE (for s3 AWS_CA_BUNDLE)."


def _file_system(url: str) -> tuple[Any, str]:
    """The asynchronous file system of a URL, and the URL's path in it. One that blocks is put on threads."""
    import fsspec
    from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

    scheme = urlsplit(url).scheme
    options: dict[str, Any] = {}
    if scheme in ("s3", "s3a"):  # tries are counted here, and a listing must not be an old one
        options = {
            "config_kwargs": {"retries": {"total_max_attempts": 1}, "max_pool_connections": _CONNECTIONS},
            "use_listings_cache": False,
        }
    try:
        files, root = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        own = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}.get(scheme)
        extra = f"pip install 'megagpt[{own}]'" if own else f"pip install the package: {error}"
        raise UserError(f"{scheme}:// needs a package that is not installed ({error}).", f"{extra}.") from error
    except ValueError as error:
        raise UserError(f"no store is known for {redacted(url)} ({error}).", "Such as s3://, gs://, hf://.") from error
    if not files.async_impl:
        return AsyncFileSystemWrapper(files, asynchronous=False), root.rstrip("/")
    if hasattr(files, "retries"):
        setattr(files, "retries", 1)  # noqa: B010 - s3fs's own, which fsspec's type does not have
    return files, root.rstrip("/")


def _kind(error: BaseException) -> Literal["missing", "denied", "untrusted", "transient"] | None:
    """What a failed request means; None for an error that is nobody's but the program's."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "missing"
    if isinstance(error, PermissionError) or status in (401, 403) or "Credential" in type(error).__name__:
        return "denied"
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in _causes(error)):
        return "untrusted"
    known = isinstance(error, OSError | EOFError | asyncio.TimeoutError | ConnectionError)
    return "transient" if known or type(error).__module__.partition(".")[0] in _CLIENTS else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
