"""The loader: micro-batches of this data rank, endless for training and bounded for evaluation.

A step that begins after `consumed` sequences covers the positions [consumed, consumed + global batch) of the stream
(order.py); data rank r of R has the r-th of R equal runs of them, cut into micro-batches. So the rows of a step do not
depend on R, the micro-batch or the thread, and tensor ranks and pipeline stages of one data rank read the same without
a word. One thread in this process reads ahead: worker processes were 20 times slower (docs/data.md).
Letters: B rows of a micro-batch, T tokens a row, S = B * T + 1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from megagpt.data.batch import IGNORE, Batch
from megagpt.data.corpus import Corpus
from megagpt.data.fetch import AHEAD_BYTES
from megagpt.data.order import Cursor, Packing, sequences
from megagpt.data.pack import Sequences, open_sequences
from megagpt.data.prefetch import Prefetched
from megagpt.data.substitute import with_substitutes
from megagpt.errors import UserError

Row = tuple[Sequences, int]  # a sequence of a split, by its number
_ROWS_AHEAD = 1 << 12  # rows that are asked for before they are needed, if they are remote
_ORDER_AHEAD = 1 << 14  # positions that are ordered in one call, since each call costs about 1 ms


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How rows become a batch. Padding is the end of text, with no target.

    Across the seam of two documents the first token of the next is a target (as in GPT-3), unless the rows are
    best_fit or attention is kept inside documents: then nothing that is seen could tell it.
    """

    context: int
    packing: Packing
    document_mask: bool
    end_of_text: int
    dtype: np.dtype

    def batch(self, rows: Sequence[Row | None], samples_B: np.ndarray) -> Batch:
        """The micro-batch of these rows; None is a row of padding."""
        B, T = len(rows), self.context
        rows_BT1 = np.empty((B, T + 1), dtype=self.dtype)
        filled = [0 if row is None else row[0].fill(row[1], rows_BT1[b]) for b, row in enumerate(rows)]
        short = [(b, size) for b, size in enumerate(filled) if size <= T]
        for b, size in short:
            rows_BT1[b, size:] = self.end_of_text
        tokens_BT, targets_BT = rows_BT1[:, :-1].astype(np.int64), rows_BT1[:, 1:].astype(np.int64)
        for b, size in short:
            targets_BT[b, max(size - 1, 0) :] = IGNORE
        cu_seqlens_S = None
        if self.document_mask or self.packing == "best_fit":
            starts = self._part_documents(rows, filled, targets_BT)
            if self.document_mask:
                cu_seqlens = np.full(B * T + 1, B * T, dtype=np.int32)
                cu_seqlens[: len(starts)] = starts
                cu_seqlens_S = torch.from_numpy(cu_seqlens)
        return Batch(
            tokens_BT=torch.from_numpy(tokens_BT),
            targets_BT=torch.from_numpy(targets_BT),
            cu_seqlens_S=cu_seqlens_S,
            samples_B=torch.from_numpy(samples_B.astype(np.int64)),
        )

    def _part_documents(self, rows: Sequence[Row | None], filled: Sequence[int], targets_BT: np.ndarray) -> list[int]:
        """Take away the targets across seams; where documents begin in the flattened rows, their padding being one."""
        starts = []
        for b, (row, size) in enumerate(zip(rows, filled, strict=True)):
            first = b * self.context
            starts.append(first)
            for seam in () if row is None else row[0].seams(row[1]):
                targets_BT[b, seam - 1] = IGNORE
                if seam < self.context:
                    starts.append(first + seam)
            if 0 < size < self.context:
                starts.append(first + size)
        return starts


def train_batches(
    corpora: Sequence[Corpus],
    cursor: Cursor,
    *,
    global_batch: Callable[[int], int],
    micro_batch: int,
    data_rank: int,
    data_ranks: int,
    document_mask: bool,
    pin: bool,
    prefetch: int,
) -> Prefetched[list[Batch]]:
    """`train_steps` through a thread that reads `prefetch` steps ahead; close() it at the end.

    The thread's place is nobody's state: after a step the trainer goes on with cursor.advanced(its sequences).
    """
    steps = train_steps(
        corpora,
        cursor,
        global_batch=global_batch,
        micro_batch=micro_batch,
        data_rank=data_rank,
        data_ranks=data_ranks,
        document_mask=document_mask,
        pin=pin,
    )
    return Prefetched(steps, prefetch)


def train_steps(
    corpora: Sequence[Corpus],
    cursor: Cursor,
    *,
    global_batch: Callable[[int], int],
    micro_batch: int,
    data_rank: int,
    data_ranks: int,
    document_mask: bool,
    pin: bool,
) -> Iterator[list[Batch]]:
    """Endless steps from `cursor` on, each the list of this data rank's micro-batches.

    `global_batch` maps consumed sequences to the sequences of the step that begins there. `corpora` are matched to the
    cursor's sources by fingerprint; context and packing are the cursor's. `pin` puts batches in page-locked memory.
    Raises UserError if a corpus of the mixture is not among `corpora`, and, from next(), where one would be read more
    than cursor.max_epochs times; ValueError, from next(), if a step's sequences are not a multiple of micro_batch *
    data_ranks.
    """
    tables = _open_sources(corpora, cursor)
    layout = _layout(corpora[0], cursor.context, cursor.packing, document_mask=document_mask)

    def steps() -> Iterator[list[Batch]]:
        consumed = cursor.consumed
        shares = _ordered(cursor, tables, _shares(consumed, global_batch, micro_batch, data_rank, data_ranks))
        if any(corpus.remote is not None for corpus in corpora):
            shares = _asked_ahead(shares, tables)
        for share in shares:
            consumed += global_batch(consumed)
            cursor.check_repetition(consumed)
            batches = [
                layout.batch(share.rows(tables, first, micro_batch), share.samples[first : first + micro_batch])
                for first in range(0, len(share.samples), micro_batch)
            ]
            yield [batch.pin_memory() for batch in batches] if pin else batches

    return steps()


def _layout(corpus: Corpus, context: int, packing: Packing, *, document_mask: bool) -> Layout:
    return Layout(
        context=context,
        packing=packing,
        document_mask=document_mask,
        end_of_text=corpus.manifest.end_of_text,
        dtype=np.dtype(corpus.manifest.dtype),
    )


def _open_sources(corpora: Sequence[Corpus], cursor: Cursor) -> dict[int, Sequences]:
    """The sequences of the sources that the current mixture draws from."""
    by_fingerprint = {corpus.fingerprint: corpus for corpus in corpora}
    tables = {}
    for number, weight in enumerate(cursor.segments[-1].weights):
        source = cursor.sources[number]
        if weight and source.fingerprint not in by_fingerprint:
            raise UserError(f"the run reads a corpus {source.fingerprint[:12]} that is not in data.mixture.")
        if weight:
            corpus = by_fingerprint[source.fingerprint]
            tables[number] = open_sequences(corpus, "train", context=cursor.context, packing=cursor.packing)
    return tables


class _Share(NamedTuple):
    """A rank's part of a step: where in the stream, and what lies there."""

    samples: np.ndarray
    corpus: np.ndarray
    sequence: np.ndarray

    def rows(self, tables: Mapping[int, Sequences], first: int, count: int) -> list[Row]:
        part = slice(first, first + count)
        numbers = zip(self.corpus[part].tolist(), self.sequence[part].tolist(), strict=True)
        return [(tables[corpus], sequence) for corpus, sequence in numbers]


def _shares(
    consumed: int, global_batch: Callable[[int], int], micro_batch: int, data_rank: int, data_ranks: int
) -> Iterator[np.ndarray]:
    """The positions that this rank has in each step, one after another."""
    while True:
        size = global_batch(consumed)
        if size < 1 or size % (micro_batch * data_ranks):
            raise ValueError(
                f"a step of {size:,} sequences is not a multiple of micro_batch {micro_batch} x data {data_ranks}"
            )
        share = size // data_ranks
        yield consumed + data_rank * share + np.arange(share)
        consumed += size


def _ordered(cursor: Cursor, tables: Mapping[int, Sequences], shares: Iterator[np.ndarray]) -> Iterator[_Share]:
    """What lies at the positions of each step, ordered for many steps in one call."""
    for first in shares:
        ahead, size = [first], len(first)
        while size < _ORDER_AHEAD:
            ahead.append(next(shares))
            size += len(ahead[-1])
        positions = np.concatenate(ahead)
        corpus, sequence = sequences(cursor, positions)
        sequence = with_substitutes(cursor, tables, positions, corpus, sequence)
        stop = 0
        for samples in ahead:
            start, stop = stop, stop + len(samples)
            yield _Share(samples, corpus[start:stop], sequence[start:stop])


def _asked_ahead(shares: Iterator[_Share], tables: Mapping[int, Sequences]) -> Iterator[_Share]:
    """The same shares, each once what the next ones need has been asked for, within bounds."""
    waiting: deque[tuple[_Share, int]] = deque()
    asked = rows = 0
    for share in shares:
        size = sum(table.ask(sequence) for table, sequence in share.rows(tables, 0, len(share.samples)))
        waiting.append((share, size))
        asked, rows = asked + size, rows + len(share.samples)
        while len(waiting) > 2 and (asked > AHEAD_BYTES or rows > _ROWS_AHEAD):
            share, size = waiting.popleft()
            asked, rows = asked - size, rows - len(share.samples)
            yield share


def heldout_batches(
    corpus: Corpus,
    *,
    context: int,
    sequences: int,
    micro_batch: int,
    data_rank: int,
    data_ranks: int,
    packing: Packing,
    document_mask: bool,
    reads: bool = True,
) -> Iterator[Batch]:
    """Micro-batches of this data rank in an evaluation: `sequences` held-out ones, spread evenly over the split.

    All of them if the split has fewer. Every rank yields equally many micro-batches of equal size; what is missing
    are rows of padding without targets, and every row of a rank that only passes batches on and `reads` none.
    Raises UserError if the held-out split is empty.
    """
    table = open_sequences(corpus, "heldout", context=context, packing=packing)
    layout = _layout(corpus, context, packing, document_mask=document_mask)
    count = min(sequences, table.count)
    steps = -(-count // (micro_batch * data_ranks))
    for step in range(steps):
        samples_B = (step * data_ranks + data_rank) * micro_batch + np.arange(micro_batch)
        numbers = [sample * table.count // count if sample < count else None for sample in samples_B.tolist()]
        rows = [(table, number) if reads and number is not None else None for number in numbers]
        yield layout.batch(rows, samples_B)
