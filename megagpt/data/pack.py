"""How a split becomes sequences of T tokens, each with a number and readable by itself.

chunk     Sequence i is the tokens [i T, i T + T] of the split: T inputs and, one further, T targets. Nothing is
          dropped: the last sequence is padded. Documents are cut wherever a multiple of T falls.
best_fit  Documents of up to T tokens stay whole. A longer one gives full sequences of T inputs (whose last target is
          the document's next token) and a remainder. Whole documents and remainders are the pieces that fill the
          other sequences, longest first, each into the fullest sequence that has room, the oldest of equals
          (best-fit-decreasing; Ding et al. 2024, arXiv:2404.10830). Every token is an input exactly once.
The plan of best_fit is a table beside the corpus (tables.py), `SPLIT.best_fit-T.plan`; R sequences, P pieces:
    row_first    int64  [R+1]  pieces before each sequence
    piece_start  int64  [P]    position of the piece's first token in the split
    piece_length uint32 [P]    its tokens; T + 1 for a full sequence whose document goes on
    metadata {"format": "megagpt best-fit plan 1", "corpus": fingerprint, "split": ..., "context": T}
It follows from the corpus alone, so that every rank may make it and the one that is late overwrites it with the same.
Cost: 12 bytes a piece; 1-3 million documents a second to plan, in windows of 4 million documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megagpt.data.corpus import Corpus, Split, open_corpus
from megagpt.data.order import Packing, Source
from megagpt.data.tables import read_table, table_bytes
from megagpt.files import write_whole

_FORMAT = "megagpt best-fit plan 1"
_WINDOW = 1 << 22


class Sequences(Protocol):
    """A split cut into sequences. Letters: T tokens; a row is T + 1 long: inputs are [:-1], targets [1:]."""

    count: int

    def fill(self, sequence: int, row: np.ndarray) -> int:
        """Write the sequence's tokens to the front of `row`; how many they are (T + 1 unless it is a short one)."""
        ...

    def seams(self, sequence: int) -> list[int]:
        """Indices into the row, above 0, at which another document begins, ascending."""
        ...

    def ask(self, sequence: int) -> int:
        """Have it fetched, if it is remote; about how many bytes that takes."""
        ...

    def pieces(self, sequence: int) -> list[tuple[int, int]]:
        """(position in the split, length) of the runs of tokens that the row holds."""
        ...

    def holding(self, first: int, stop: int) -> np.ndarray:
        """The sequences that have a token of the split's [first, stop)."""
        ...


class Chunks:
    """Packing `chunk`: documents end to end, cut at every multiple of T."""

    def __init__(self, split: Split, context: int) -> None:
        self.split, self.context = split, context
        self.count = -(-(split.tokens - 1) // context)

    def fill(self, sequence: int, row: np.ndarray) -> int:
        start = sequence * self.context
        left = self.split.tokens - start
        self.split.copy(start, row if left >= len(row) else row[:left])
        return min(left, len(row))

    def seams(self, sequence: int) -> list[int]:
        start = sequence * self.context
        return self.split.seams(start, min(start + self.context + 1, self.split.tokens))

    def ask(self, sequence: int) -> int:
        start = sequence * self.context
        return self.split.ask(start, start + self.context + 1)

    def pieces(self, sequence: int) -> list[tuple[int, int]]:
        start = sequence * self.context
        return [(start, min(self.context + 1, self.split.tokens - start))]

    def holding(self, first: int, stop: int) -> np.ndarray:
        before = -(-first // self.context)  # sequences whose last target lies before `first`, and one more
        return np.arange(max(0, before - 1), min(self.count, (stop - 1) // self.context + 1))


class BestFit:
    """Packing `best_fit`: whole documents, as the plan says."""

    def __init__(self, split: Split, plan: Mapping[str, np.ndarray]) -> None:
        self.split = split
        self.count = len(plan["row_first"]) - 1
        self._row_first = plan["row_first"].data
        self._piece_start = plan["piece_start"].data
        self._piece_length = plan["piece_length"].data

    def fill(self, sequence: int, row: np.ndarray) -> int:
        at = 0
        pieces = slice(self._row_first[sequence], self._row_first[sequence + 1])
        for start, length in zip(self._piece_start[pieces], self._piece_length[pieces], strict=True):
            self.split.copy(start, row[at : at + length])
            at += length
        return at

    def seams(self, sequence: int) -> list[int]:
        return list(accumulate(self._piece_length[self._row_first[sequence] : self._row_first[sequence + 1] - 1]))

    def ask(self, sequence: int) -> int:
        pieces = slice(self._row_first[sequence], self._row_first[sequence + 1])
        spans = zip(self._piece_start[pieces], self._piece_length[pieces], strict=True)
        return sum(self.split.ask(start, start + length) for start, length in spans)

    def pieces(self, sequence: int) -> list[tuple[int, int]]:
        pieces = slice(self._row_first[sequence], self._row_first[sequence + 1])
        return list(zip(self._piece_start[pieces], self._piece_length[pieces], strict=True))

    def holding(self, first: int, stop: int) -> np.ndarray:
        starts = np.asarray(self._piece_start)
        pieces = np.flatnonzero((starts < stop) & (starts + self._piece_length > first))
        return np.unique(np.searchsorted(self._row_first, pieces, "right") - 1)


def open_sequences(corpus: Corpus, split: str, *, context: int, packing: Packing) -> Sequences:
    """A split's sequences; best_fit reads its plan, or makes it. Raises UserError if the split is empty."""
    tokens = corpus.split(split)
    if packing == "chunk":
        return Chunks(tokens, context)
    return BestFit(tokens, _stored_plan(corpus, split, tokens, context))


def source(corpus: Corpus, *, context: int, packing: Packing, windowed: bool = False) -> Source:
    """The corpus's training split as the data order knows it; in a windowed one its shards count."""
    sequences = open_sequences(corpus, "train", context=context, packing=packing)
    runs = len(corpus.manifest.shards_of("train")) if windowed else 1
    return Source(fingerprint=corpus.fingerprint, sequences=sequences.count, runs=runs)


def _plan_path(corpus: Corpus, split: str, context: int) -> Path:
    return corpus.folder / f"{split}.best_fit-{context}.plan"


def _plan_metadata(corpus: Corpus, split: str, context: int) -> dict[str, Any]:
    return {"format": _FORMAT, "corpus": corpus.fingerprint, "split": split, "context": context}


def _stored_plan(corpus: Corpus, split: str, tokens: Split, context: int) -> dict[str, np.ndarray]:
    path, metadata = _plan_path(corpus, split, context), _plan_metadata(corpus, split, context)
    try:
        arrays, found = read_table(path)
        if found == metadata:
            return arrays
    except (OSError, ValueError):
        pass  # there is none yet, or it is a broken one: it is made below
    arrays = best_fit_plan(tokens, context)
    with suppress(OSError):  # in a corpus that cannot be written the plan lives in memory
        write_whole(path, table_bytes(arrays, metadata))
    return arrays


def verify_plans(folder: Path, *, repair: bool) -> list[str]:
    """Make each plan beside a corpus again and compare; what differs, a sentence each. `repair` writes it again."""
    corpus = open_corpus(folder)
    problems = []
    for path in sorted(folder.glob("*.best_fit-*.plan")):
        split, context = path.stem.split(".best_fit-")
        arrays = best_fit_plan(corpus.split(split), int(context))
        content = table_bytes(arrays, _plan_metadata(corpus, split, int(context)))
        if path.read_bytes() == content:
            continue
        if repair:
            write_whole(path, content)
        else:
            problems.append(f"{path} is not this corpus's plan; --repair makes it again.")
    return problems


def best_fit_plan(split: Split, context: int) -> dict[str, np.ndarray]:
    """The plan's three arrays; a function of the documents' lengths and `context` alone."""
    windows = [_window_plan(starts, lengths, context) for starts, lengths in _windows(split)]
    row_sizes, piece_start, piece_length = (np.concatenate(arrays) for arrays in zip(*windows, strict=True))
    row_first = np.concatenate([[0], np.cumsum(row_sizes, dtype=np.int64)])
    return {"row_first": row_first, "piece_start": piece_start, "piece_length": piece_length}


def _windows(split: Split) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Runs of documents, of whole shards, small enough to plan in memory."""
    held: list[tuple[np.ndarray, np.ndarray]] = []
    size = 0
    for starts, lengths in split.document_spans():
        if held and size + len(starts) > _WINDOW:
            yield np.concatenate([pair[0] for pair in held]), np.concatenate([pair[1] for pair in held])
            held, size = [], 0
        held.append((starts, lengths))
        size += len(starts)
    yield np.concatenate([pair[0] for pair in held]), np.concatenate([pair[1] for pair in held])


def _window_plan(starts: np.ndarray, lengths: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pieces of each row, piece starts, piece lengths) of some documents."""
    pieces = -(-lengths // context)
    document = np.repeat(np.arange(len(lengths)), pieces)
    number = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = starts[document] + number * context
    inputs = np.minimum(context, lengths[document] - number * context)
    goes_on = number < pieces[document] - 1
    longest_first = np.argsort(-inputs, kind="stable")
    row = _best_fit_rows(inputs[longest_first], context)
    order = longest_first[np.argsort(row, kind="stable")]
    return np.bincount(row), start[order], (inputs + goes_on)[order].astype(np.uint32)


def _best_fit_rows(lengths: np.ndarray, context: int) -> np.ndarray:
    """The row of each piece, `lengths` being in descending order.

    Equal lengths are placed at once: the fullest rows with room take as many as fit, then new rows are begun.
    """
    row = np.empty(len(lengths), dtype=np.int64)
    rows = 0
    room = _Room()
    sizes, starts = np.unique(-lengths, return_index=True)
    for length, at, stop in zip((-sizes).tolist(), starts.tolist(), [*starts[1:].tolist(), len(lengths)], strict=True):
        while at < stop:
            size, candidates = room.take(length)
            if not size:
                size, each = context, context // length
                candidates = np.arange(rows, rows - (at - stop) // each)
                rows += len(candidates)
            each = size // length
            taken = np.repeat(candidates, each)[: stop - at]
            row[at : at + len(taken)] = taken
            at += len(taken)
            filled, part = divmod(len(taken), each)
            room.give(size - each * length, candidates[:filled])
            room.give(size - part * length, candidates[filled:][:1])
            room.give(size, candidates[filled + 1 :])
    return row


class _Room:
    """Rows by their free tokens, the oldest first."""

    def __init__(self) -> None:
        self._rows: dict[int, list[np.ndarray]] = {}
        self._sizes = 0  # bit r is set where some row has r free tokens

    def give(self, size: int, rows: np.ndarray) -> None:
        if size and len(rows):
            self._rows.setdefault(size, []).append(rows)
            self._sizes |= 1 << size

    def take(self, length: int) -> tuple[int, np.ndarray]:
        """All rows of the least room that `length` fits in, and that room; 0 if there is none."""
        fitting = self._sizes >> length
        if not fitting:
            return 0, np.zeros(0, np.int64)
        size = length + (fitting & -fitting).bit_length() - 1
        self._sizes &= ~(1 << size)
        return size, np.concatenate(self._rows.pop(size))
