"""The data order as a formula: position in the run's stream -> (corpus, sequence). No file, no table, no buffer.

Stream.   Positions count sequences from 0. A mixture holds from one position to the next change: a *segment*.
Mixture.  Integer weights w_1 >= w_2 >= ... of sum W, divided by their greatest common divisor. At offset r of a
          period of W positions, corpus k had c_k(r_k) = floor((2 r_k w_k + W_k) / (2 W_k)) sequences, where r_1 = r,
          W_1 = W, r_{k+1} = r_k - c_k(r_k), W_{k+1} = W_k - w_k: nearest-integer shares, the heaviest first, each
          taken from what the heavier ones left. Position r is corpus k's if c_k(r_k + 1) > c_k(r_k), for the first
          such k. Every period holds exactly w_k of each; a prefix is off its share by less than 2 (measured 1.3).
Epochs.   A corpus's j-th sequence in the run (its ordinal, over all segments) is sequence P(j mod n) of epoch j // n,
          n being its number of sequences.
Shuffle.  P is a keyed permutation of [0, n) (shuffle.py), named "seed:fingerprint:epoch"; with a window it moves the
          corpus's runs as wholes and shuffles inside windows of some runs, for shards that are fetched.
Skips.    Positions count what is served. A skipped range of them is passed over from then on: the positions behind it
          move up, and what lay in it is never read. It counts as read where epochs are counted.
Lost.     Blocks that are broken in their store (data.bad_block). What is read in place of them: substitute.py.
Cost.     0.2-0.4 us a position in calls of thousands; a call costs about 1 ms, so callers ask for many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any, Literal, NamedTuple

import numpy as np

from megagpt.data.shuffle import shuffled, window_shuffled
from megagpt.errors import UserError

ALGORITHM = 1
Packing = Literal["chunk", "best_fit"]
_MOST_SKIPS = 64
_MOST_LOST = 16  # a store that loses more is broken as a whole
_LARGEST_WEIGHTS = 1 << 30  # 2 * W * W stays below 2**63


@dataclass(frozen=True)
class Source:
    """A corpus in the stream: what names it, and its sequences at the run's context and packing.

    `runs` are the equal parts that a windowed order moves as wholes: as many as it has shards.
    """

    fingerprint: str
    sequences: int
    runs: int = 1


@dataclass(frozen=True)
class Segment:
    """From `start` on, the mixture has these weights, one for each of the cursor's sources (0: absent).

    `start` counts skipped positions too.
    """

    start: int
    weights: tuple[int, ...]


class Lost(NamedTuple):
    """A block that is broken: the tokens [first, stop) of a source's split are not read from position `since` on."""

    since: int
    source: int
    first: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """Where a run stands in its data: the whole state, equal on every rank, at most a few KB.

    window       runs of a corpus that are shuffled together; None: all
    max_epochs   times that a corpus may be read; None: without end
    skipped      ranges [first, stop) of the stream, skipped positions counted, ascending and apart
    lost         blocks that other sequences are read in place of, in the order in which they were found
    """

    algorithm: int
    seed: int
    context: int
    packing: Packing
    consumed: int
    sources: tuple[Source, ...]
    segments: tuple[Segment, ...]
    window: int | None = None
    max_epochs: int | None = None
    skipped: tuple[tuple[int, int], ...] = ()
    lost: tuple[Lost, ...] = ()

    def advanced(self, sequences: int) -> Cursor:
        """The cursor after `sequences` more."""
        return replace(self, consumed=self.consumed + sequences)

    def with_mixture(self, weights: Mapping[Source, int]) -> Cursor:
        """The cursor whose stream has other weights from here on; sources may be new, and others left out.

        What was consumed stays consumed: each corpus goes on after its own last sequence. The same weights as now
        change nothing. Raises UserError for a weight below 1, or a corpus with no sequences or now another number.
        """
        known = {source.fingerprint: source for source in self.sources}
        for source, weight in weights.items():
            if weight < 1:
                raise UserError(f"corpus {source.fingerprint[:12]} has the weight {weight}; it must be at least 1.")
            if source.sequences < 1:
                raise UserError(f"corpus {source.fingerprint[:12]} has no sequence of {self.context} tokens.")
            if known.setdefault(source.fingerprint, source) != source:
                was, now = known[source.fingerprint].sequences, source.sequences
                raise UserError(f"corpus {source.fingerprint[:12]} had {was:,} sequences and now has {now:,}.")
        sources = tuple(known.values())
        values = tuple(weights.get(source, 0) for source in sources)
        divisor = gcd(*values) or 1
        values = tuple(value // divisor for value in values)
        if not 0 < sum(values) <= _LARGEST_WEIGHTS:
            raise UserError(f"the weights of the mixture add up to {sum(values):,}; at most {_LARGEST_WEIGHTS:,}.")
        if self.segments and values == _widened(self.segments[-1], len(sources)).weights:
            return self
        begin = self.passed(self.consumed)
        kept = [segment for segment in self.segments if segment.start < begin]
        segments = [_widened(segment, len(sources)) for segment in (*kept, Segment(begin, values))]
        return replace(self, sources=sources, segments=tuple(segments))

    def skipping(self, first: int, stop: int) -> Cursor:
        """The cursor whose stream leaves out what its positions [first, stop) hold, as after a loss spike.

        Positions before `first` keep what they hold; `stop` and those behind it move up to `first`. Raises UserError
        if the range is empty, begins before what was consumed, or is one too many for a small state.
        """
        if not self.consumed <= first < stop:
            raise UserError(
                f"the positions {first:,} to {stop:,} cannot be skipped: {self.consumed:,} sequences were consumed.",
                "Go back to a checkpoint before the range, and name a range that is not empty.",
            )
        begin, end = self.passed(first), self.passed(stop - 1) + 1
        joined = [(begin, end), *(bounds for bounds in self.skipped if begin <= bounds[1] and bounds[0] <= end)]
        apart = [bounds for bounds in self.skipped if bounds not in joined]
        if len(apart) == _MOST_SKIPS:
            raise UserError(f"the run skips {_MOST_SKIPS} ranges of its data already; its fault lies elsewhere.")
        whole = (min(first for first, _ in joined), max(stop for _, stop in joined))
        return replace(self, skipped=tuple(sorted([*apart, whole])))

    def losing(self, source: int, first: int, stop: int) -> Cursor:
        """The cursor that from here on reads other sequences in place of those with a token in [first, stop).

        Raises UserError if the run has lost too many blocks already.
        """
        if len(self.lost) == _MOST_LOST:
            raise UserError(
                f"{_MOST_LOST} blocks of this run's corpora are broken already, and now one more: their store is not "
                "to be trusted.",
                "See events.jsonl for their names; copy those shards again from a whole corpus, and begin again.",
            )
        return replace(self, lost=(*self.lost, Lost(self.consumed, source, first, stop)))

    def passed(self, position: int) -> int:
        """Where a position lies in the stream with nothing skipped."""
        return int(_with_skipped(self.skipped, np.array([position]))[0])

    def epochs(self, stop: int) -> dict[Source, float]:
        """How often each corpus is read before position `stop`."""
        counts = _before(self.segments, self.passed(stop - 1) + 1 if stop else 0)
        return {source: count / source.sequences for source, count in zip(self.sources, counts.tolist(), strict=True)}

    def check_repetition(self, stop: int) -> None:
        """Raise UserError if a corpus is read more than max_epochs times before position `stop`."""
        if self.max_epochs is None:
            return
        for source, epochs in self.epochs(stop).items():
            if epochs > self.max_epochs:
                raise UserError(
                    f"{stop:,} sequences read the corpus {source.fingerprint[:12]} ({source.sequences:,} sequences) "
                    f"{epochs:.2f} times; data.max_epochs = {self.max_epochs} allows no more.",
                    "Give it a smaller weight, more text or fewer tokens to the run, or raise data.max_epochs.",
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return {
            "algorithm": self.algorithm,
            "seed": self.seed,
            "context": self.context,
            "packing": self.packing,
            "consumed": self.consumed,
            "sources": [[source.fingerprint, source.sequences, source.runs] for source in self.sources],
            "segments": [[segment.start, *segment.weights] for segment in self.segments],
            "window": self.window,
            "max_epochs": self.max_epochs,
            "skipped": [list(bounds) for bounds in self.skipped],
            "lost": [list(block) for block in self.lost],
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Cursor:
        """Raises UserError if the order was made by another version of the algorithm."""
        if values["algorithm"] != ALGORITHM:
            raise UserError(
                f"this run's data order is of version {values['algorithm']}; this megagpt makes version {ALGORITHM}.",
                "Go on with the megagpt that began the run, or begin a new run.",
            )
        sources = tuple(Source(*source) for source in values["sources"])
        segments = tuple(Segment(int(start), tuple(weights)) for start, *weights in values["segments"])
        skipped = tuple((first, stop) for first, stop in values.get("skipped", ()))
        lost = tuple(Lost(*block) for block in values.get("lost", ()))
        return Cursor(**{**values, "sources": sources, "segments": segments, "skipped": skipped, "lost": lost})


def start(
    *, seed: int, context: int, packing: Packing, weights: Mapping[Source, int], window: int | None = None
) -> Cursor:
    """The cursor of a run that has consumed nothing. Raises UserError as Cursor.with_mixture."""
    empty = Cursor(
        algorithm=ALGORITHM,
        seed=seed,
        context=context,
        packing=packing,
        consumed=0,
        sources=(),
        segments=(),
        window=window,
    )
    return empty.with_mixture(weights)


def _widened(segment: Segment, sources: int) -> Segment:
    return Segment(segment.start, segment.weights + (0,) * (sources - len(segment.weights)))


def sequences(cursor: Cursor, positions: np.ndarray, *, later: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(index into cursor.sources, sequence of that corpus) of each position: int64 arrays, pure.

    Positions may lie anywhere from 0, before or after cursor.consumed. Raises ValueError below 0. `later`: what the
    same place of an epoch holds so many epochs later, instead.
    """
    positions = np.asarray(positions, dtype=np.int64)
    if positions.size and positions.min() < 0:
        raise ValueError("positions in the stream count from 0")
    corpus, ordinal = _mixed(cursor.segments, _with_skipped(cursor.skipped, positions))
    sequence = np.empty_like(ordinal)
    for number, source in enumerate(cursor.sources):
        mine = np.flatnonzero(corpus == number)
        if len(mine):
            sequence[mine] = _shuffled(
                cursor, source, *np.divmod(ordinal[mine] + later * source.sequences, source.sequences)
            )
    return corpus, sequence


def _shuffled(cursor: Cursor, source: Source, epoch: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The sequence of a corpus at each index of its epochs."""
    epochs, which = np.unique(epoch, return_inverse=True)
    names = [f"{cursor.seed}:{source.fingerprint}:{value}" for value in epochs.tolist()]
    if cursor.window is None or cursor.window >= source.runs:
        return shuffled(index, source.sequences, names, which)
    sequence = np.empty_like(index)
    for number, name in enumerate(names):
        here = which == number
        sequence[here] = window_shuffled(index[here], source.sequences, name, runs=source.runs, window=cursor.window)
    return sequence


def _with_skipped(skipped: Sequence[tuple[int, int]], positions: np.ndarray) -> np.ndarray:
    """Where positions lie in the stream with nothing skipped."""
    if not skipped:
        return positions
    first, stop = np.array(skipped, dtype=np.int64).T
    before = np.concatenate([[0], np.cumsum(stop - first)])
    return positions + before[np.searchsorted(first - before[:-1], positions, "right")]


def _before(segments: Sequence[Segment], position: int) -> np.ndarray:
    """Sequences of each corpus before `position`, over all segments."""
    total = np.zeros(len(segments[0].weights), dtype=np.int64)
    stops = [segment.start for segment in segments[1:]] + [position]
    for segment, stop in zip(segments, stops, strict=True):
        length = min(stop, position) - segment.start
        if length > 0:
            total += _counts(segment.weights, length)
    return total


def _mixed(segments: Sequence[Segment], positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(corpus, ordinal in the run) of each position."""
    corpus, ordinal = np.empty_like(positions), np.empty_like(positions)
    which = np.searchsorted([segment.start for segment in segments], positions, "right") - 1
    for number in np.unique(which):
        here, segment = which == number, segments[number]
        corpus[here], ordinal[here] = _interleaved(segment.weights, positions[here] - segment.start)
        ordinal[here] += _before(segments, segment.start)[corpus[here]]
    return corpus, ordinal


def _heaviest_first(weights: Sequence[int]) -> list[int]:
    return sorted((k for k in range(len(weights)) if weights[k]), key=lambda k: -weights[k])


def _counts(weights: Sequence[int], length: int) -> np.ndarray:
    """Sequences of each corpus among the first `length` positions of a mixture."""
    periods, left = divmod(length, sum(weights))
    counts = np.array(weights, dtype=np.int64) * periods
    rest = sum(weights)
    for k in _heaviest_first(weights):
        share = (2 * left * weights[k] + rest) // (2 * rest)
        counts[k] += share
        left, rest = left - share, rest - weights[k]
    return counts


def _interleaved(weights: Sequence[int], offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(corpus, ordinal within the mixture) of each offset."""
    rest = sum(weights)
    periods, left = np.divmod(offsets, rest)
    corpus, ordinal = np.full_like(offsets, -1), np.empty_like(offsets)
    for k in _heaviest_first(weights):
        share = (2 * left * weights[k] + rest) // (2 * rest)
        after = (2 * (left + 1) * weights[k] + rest) // (2 * rest)
        taken = (corpus < 0) & (after > share)
        corpus[taken] = k
        ordinal[taken] = periods[taken] * weights[k] + share[taken]
        left, rest = left - share, rest - weights[k]
    return corpus, ordinal
