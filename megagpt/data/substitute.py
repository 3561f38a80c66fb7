"""What is read in place of sequences whose tokens are broken in the store (data.bad_block = "substitute").

The cursor names the lost blocks, each from a position on. A sequence with a token of one is replaced by the sequence
that the same place of the corpus's next epoch holds, or the epoch after that, until it is a whole one: a function of
the cursor and the index, the same on every rank and at every replay, and spread over the corpus.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megagpt.data import order
from megagpt.data.order import Cursor
from megagpt.data.pack import Sequences
from megagpt.errors import UserError

_EPOCHS = 1000  # that are looked through; of a corpus a tenth of which is whole, all but one in 10^45 find one


def with_substitutes(
    cursor: Cursor, tables: Mapping[int, Sequences], positions: np.ndarray, corpus: np.ndarray, sequence: np.ndarray
) -> np.ndarray:
    """The sequence that is read at each position, where order.sequences gives (corpus, sequence).

    `tables` are the sequences of the sources, by their number. Raises UserError if a corpus has no whole one.
    """
    left = np.flatnonzero(touching_lost(cursor, tables, positions, corpus, sequence))
    found = sequence.copy()
    for later in range(1, _EPOCHS + 1):
        if not len(left):
            return found
        _, found[left] = order.sequences(cursor, positions[left], later=later)
        left = left[touching_lost(cursor, tables, positions[left], corpus[left], found[left])]
    raise UserError(
        f"the corpus {cursor.sources[corpus[left[0]]].fingerprint[:12]} has hardly a sequence that is not broken.",
        "Copy it to its store again.",
    )


def touching_lost(
    cursor: Cursor, tables: Mapping[int, Sequences], positions: np.ndarray, corpus: np.ndarray, sequence: np.ndarray
) -> np.ndarray:
    """Whether the sequence at each position has a token of a block that is lost there: bool array."""
    touching = np.zeros(len(positions), dtype=bool)
    for block in cursor.lost:
        here = np.flatnonzero((corpus == block.source) & (positions >= block.since))
        if len(here):
            touching[here] |= np.isin(sequence[here], tables[block.source].holding(block.first, block.stop))
    return touching
