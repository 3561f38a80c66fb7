"""A block that is broken in its store, found by any rank: all agree to read other sequences in its place.

A block that one rank cannot read another may have read well, or will not read at all. So before a step each rank says
whether its data came, in one all-reduce; the block at the lowest place goes into the cursor of all, and every rank
reads the step again, from a cursor that they share. It is saved with the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megagpt.checkpoint.saver import Progress
from megagpt.data import order
from megagpt.data.corpus import Corpus
from megagpt.data.fetch import BadBlock
from megagpt.data.order import Cursor
from megagpt.data.pack import open_sequences
from megagpt.data.substitute import touching_lost
from megagpt.parallel import ranks
from megagpt.report.journal import Journal

_NONE = 2**62
_TOKENS = 2**44  # more than a split has: one number holds a source and a place in it


def lost_a_block(
    found: BadBlock | None, progress: Progress, corpora: Sequence[Corpus], size: int, journal: Journal
) -> bool:
    """Whether a rank has `found` a broken block in the next step, of `size` sequences; it is in progress.cursor then.

    Every rank must call it before every step. Raises UserError if it is one too many.
    """
    cursor = progress.cursor
    mine = _NONE if found is None else _source(cursor, found.corpus) * _TOKENS + found.first
    place = ranks.lowest_over_ranks(mine)
    if place == _NONE:
        return False
    here = found if mine == place else None
    stop = ranks.lowest_over_ranks(_NONE if here is None else here.stop)
    block = ranks.lowest_over_ranks(_NONE if here is None else here.block)
    rank = ranks.lowest_over_ranks(_NONE if here is None else ranks.rank())
    source, first = divmod(place, _TOKENS)
    progress.cursor = cursor.losing(source, first, stop)
    if ranks.rank() == 0:
        corpus = next(corpus for corpus in corpora if corpus.fingerprint == cursor.sources[source].fingerprint)
        shard = _shard(corpus, first)
        positions = _positions(progress.cursor, source, corpus, size)
        journal.event(
            "bad_block",
            step=progress.step + 1,
            rank=rank,
            cause=f"block {block} of {corpus.location}/{shard}.tar fails its crc32 however often it is fetched",
            action=f"other sequences are read in its place from position {cursor.consumed:,} on",
            corpus=corpus.location,
            shard=shard,
            block=block,
            tokens=[first, stop],
            positions=positions,
        )
    return True


def _source(cursor: Cursor, fingerprint: str) -> int:
    return next(number for number, source in enumerate(cursor.sources) if source.fingerprint == fingerprint)


def _shard(corpus: Corpus, token: int) -> str:
    """The name of the training shard that a token of the split lies in."""
    entries = corpus.manifest.shards_of("train")
    ends = np.cumsum([entry.tokens for entry in entries])
    return entries[int(np.searchsorted(ends, token, "right"))].name


def _positions(cursor: Cursor, source: int, corpus: Corpus, size: int) -> list[int]:
    """The positions of the next step that read the block that was lost last."""
    positions = np.arange(cursor.consumed, cursor.consumed + size)
    table = open_sequences(corpus, "train", context=cursor.context, packing=cursor.packing)
    newest = replace(cursor, lost=cursor.lost[-1:])
    return positions[touching_lost(newest, {source: table}, positions, *order.sequences(cursor, positions))].tolist()
