"""The supervisor's end of the ranks' lifelines: who is there, who ended, and whose node fell silent.

A rank's process may be stopped, stuck or swapped out: its kernel still answers. So a connection that ends means that a
process ended, and one that times out means that its node or its wire is gone. Standard library alone.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

IDLE_SECONDS, INTERVAL_SECONDS, PROBES = 1, 1, 3
"""A silent node is noticed after their sum and product: 4 s."""
_GREETING_BYTES = 4096


@dataclass
class Line:
    """One rank's connection."""

    rank: int
    host: str
    step_id: str
    """Of SLURM's job step."""
    ended: float | None = None
    """When it did, by time.monotonic()."""
    silent: bool = False
    """It ended without a word: the node does not answer any more."""


@dataclass
class Lifelines:
    """Listens for the ranks of one attempt while the context lasts."""

    token: str = field(default_factory=lambda: secrets.token_hex(16))
    lines: list[Line] = field(default_factory=list)

    def __enter__(self) -> Lifelines:
        self._listener = socket.create_server(("", 0), backlog=4096)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            with contextlib.closing(key.fileobj):  # type: ignore[arg-type]
                pass
        self._selector.close()

    @property
    def address(self) -> str:
        """HOST:PORT, for the ranks."""
        return f"{socket.gethostname()}:{self._listener.getsockname()[1]}"

    def lost(self) -> list[Line]:
        """The connections that ended, the first first."""
        return sorted((line for line in self.lines if line.ended is not None), key=lambda line: line.ended or 0.0)

    def alive(self) -> list[Line]:
        return [line for line in self.lines if line.ended is None]

    def _listen(self) -> None:
        while not self._over.is_set():
            for key, _ in self._selector.select(timeout=0.1):
                connection: Any = key.fileobj
                if connection is self._listener:
                    self._accept()
                else:
                    self._read(connection, key.data)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("IDLE", IDLE_SECONDS), ("INTVL", INTERVAL_SECONDS), ("CNT", PROBES)):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{name}"), value)
        self._selector.register(connection, selectors.EVENT_READ, None)

    def _read(self, connection: socket.socket, line: Line | None) -> None:
        """A greeting, or the end. Whoever greets without the token is hung up on."""
        try:
            said = connection.recv(_GREETING_BYTES)
            silent = False
        except OSError as error:
            said, silent = b"", not isinstance(error, ConnectionError)
        if line is None:
            line = self._greeted(said)
            if line is not None:
                self.lines.append(line)
                self._selector.modify(connection, selectors.EVENT_READ, line)
                return
        elif said:
            return
        else:
            line.silent = silent
            line.ended = time.monotonic()
        self._selector.unregister(connection)
        connection.close()

    def _greeted(self, said: bytes) -> Line | None:
        try:
            words = json.loads(said)
            if secrets.compare_digest(str(words["token"]), self.token):
                return Line(int(words["rank"]), str(words["host"]), str(words["step_id"]))
        except (ValueError, KeyError, TypeError):
            pass
        return None
