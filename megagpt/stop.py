"""Stop politely: SIGTERM or SIGINT asks the run to save after the step it is in; a second one ends it at once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """A context in which the first SIGTERM or SIGINT sets `asked`, and the second does what it would have done."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)
