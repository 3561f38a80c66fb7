"""One thread that reads ahead of its consumer, in this process and in bounded memory."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")
_SECONDS_TO_END = 20.0


class Prefetched(Generic[Item]):
    """An iterator read ahead by at most `depth` items. What goes wrong in the thread is raised by next()."""

    def __init__(self, items: Iterator[Item], depth: int) -> None:
        if depth < 1:
            raise ValueError(f"prefetch = {depth} must be at least 1")
        self._items = items
        self._queue: queue.Queue[Item | _End] = queue.Queue(depth)
        self._closing = threading.Event()
        self._end: _End | None = None
        self._thread = threading.Thread(target=self._read, name="megagpt-prefetch", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        end = _End(None)
        try:
            for item in self._items:
                self._queue.put(item)
                if self._closing.is_set():
                    return
        except Exception as error:  # handed to the consumer, who raises it
            end = _End(error)
        self._queue.put(end)

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._end is None:
            item = self._queue.get()
            if not isinstance(item, _End):
                return item
            self._end = item
        raise StopIteration if self._end.error is None else self._end.error

    def close(self) -> None:
        """Stop the thread and wait for it. No item comes after this.

        One that is held up, by a store that does not answer, is left to end by itself.
        """
        self._closing.set()
        deadline = time.monotonic() + _SECONDS_TO_END
        while self._thread.is_alive() and time.monotonic() < deadline:
            try:
                self._queue.get(timeout=0.01)
            except queue.Empty:
                continue
        self._end = _End(None)

    def __enter__(self) -> Prefetched[Item]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _End:
    """What the thread leaves behind when it stops by itself."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error
