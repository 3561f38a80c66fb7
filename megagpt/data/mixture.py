"""What a mixture would read over a budget of tokens, and how well a windowed order shuffles: before a run is begun."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megagpt.data.order import Cursor, Segment, sequences

_STRETCHES, _STRETCH = 16, 1024  # places in the first epoch that are looked at, and sequences at each


@dataclass(frozen=True)
class Share:
    """What a run reads of one corpus."""

    fingerprint: str
    sequences: int
    tokens: int
    epochs: float


def shares(cursor: Cursor, tokens: int) -> list[Share]:
    """What a stream of `tokens` reads of each corpus."""
    stop = -(-tokens // cursor.context)
    return [
        Share(source.fingerprint, source.sequences, round(epochs * source.sequences) * cursor.context, epochs)
        for source, epochs in cursor.epochs(stop).items()
    ]


def runs_at_once(cursor: Cursor, number: int) -> tuple[float, float]:
    """How many of a corpus's runs 1,024 sequences in a row come from, on average; and how many in a full shuffle.

    Counted as 2^H, H being the entropy of their shares, at places spread over the first epoch.
    """
    source = cursor.sources[number]
    alone = Segment(0, tuple(int(k == number) for k in range(len(cursor.sources))))
    found = []
    for window in (cursor.window, None):
        stream = replace(cursor, segments=(alone,), window=window, skipped=(), consumed=0)
        length = min(_STRETCH, source.sequences)
        firsts = np.linspace(0, source.sequences - length, _STRETCHES).astype(np.int64)
        found.append(float(np.mean([_effective(stream, first, length, number) for first in firsts])))
    return found[0], found[1]


def _effective(stream: Cursor, first: int, length: int, number: int) -> float:
    source = stream.sources[number]
    _, sequence = sequences(stream, np.arange(first, first + length))
    _, counts = np.unique(sequence // -(-source.sequences // source.runs), return_counts=True)
    share = counts / counts.sum()
    return float(2 ** -(share * np.log2(share)).sum())
