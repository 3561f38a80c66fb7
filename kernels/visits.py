"""How many tiles of keys interval attention visits: the bounds of `attention_tiles.py`, counted without running.

Legend: T tokens; M rows and C columns of a tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def tiles_visited(
    T: int, *, rows: int, columns: int, causal: bool = True, window: int | None = None,
    lengths: Sequence[int] | None = None,
) -> int:  # fmt: skip
    """Tiles that a head's forward or dq visits in self-attention, of ceil(T / rows) * ceil(T / columns) dense ones.

    `lengths` are those of the documents in a row; together they are T.
    """
    bounds = [0, *itertools.accumulate(lengths)] if lengths is not None else [0, T]
    if bounds[-1] != T:
        raise ValueError(f"documents of {bounds[-1]:,} tokens do not fill {T:,}.")
    start = [first for first, stop in itertools.pairwise(bounds) for _ in range(stop - first)]
    last = [stop - 1 for first, stop in itertools.pairwise(bounds) for _ in range(stop - first)]
    reach = T if window is None else window - 1
    visited = 0
    for row in range(0, T, rows):
        final = min(row + rows, T) - 1
        low = max(start[row], row - reach)
        high = min(last[final], final if causal else final + reach)
        visited += high // columns - low // columns + 1
    return visited
