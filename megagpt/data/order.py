"""The data order as a formula: position in the run's stream -> (corpus, sequence). No file, no table, no buffer.

Stream.   Positions count sequences from 0. A mixture holds from one position to the next change: a *segment*.
Mixture.  Integer weights w_1 >= w_2 >= ... of sum W, divided by their greatest common divisor. At offset r of a
          period of W positions, corpus k had c_k(r_k) = floor((2 r_k w_k + W_k) / (2 W_k)) sequences, where r_1 = r,
          W_1 = W, r_{k+1} = r_k - c_k(r_k), W_{k+1} = W_k - w_k: nearest-integer shares, the heaviest first, each
          taken from what the heavier ones left. Position r is corpus k's if c_k(r_k + 1) > c_k(r_k), for the first
          such k. Every period holds exactly w_k of each; a prefix is off its share by less than 2 (measured 1.3).
Epochs.   A corpus's j-th sequence in the run (its ordinal, over all segments) is sequence P(j mod n) of epoch j // n,
          n being its number of sequences.
Shuffle.  P is a keyed permutation of [0, n): a 6-round Feistel network (Luby and Rackoff 1988, SIAM J. Comput. 17(2))
          on b = max(2, bits of n - 1) bits, repeated while its output is >= n (cycle walking: Black and Rogaway 2002,
          CT-RSA, "Ciphers with arbitrary finite domains"). Round i: (L, R) -> (R, L xor F(R, key_i)), the halves of
          b - b//2 and b//2 bits changing places; F is the low bits of splitmix64's finaliser of R + key_i (Steele et
          al. 2014, OOPSLA). The keys are the 8-byte little-endian words of shake_256("seed:fingerprint:epoch").
Cost.     0.2-0.4 us a position in calls of thousands; a call costs about 1 ms, so callers ask for many.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any, Literal

import numpy as np

from megagpt.errors import UserError

ALGORITHM = 1
Packing = Literal["chunk", "best_fit"]
_ROUNDS = 6
_LARGEST_WEIGHTS = 1 << 30  # 2 * W * W stays below 2**63


@dataclass(frozen=True)
class Source:
    """A corpus in the stream: what names it, and its sequences at the run's context and packing."""

    fingerprint: str
    sequences: int


@dataclass(frozen=True)
class Segment:
    """From position `start` on, the mixture has these weights, one for each of the cursor's sources (0: absent)."""

    start: int
    weights: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """Where a run stands in its data: the whole state, equal on every rank, at most a few KB."""

    algorithm: int
    seed: int
    context: int
    packing: Packing
    consumed: int
    sources: tuple[Source, ...]
    segments: tuple[Segment, ...]

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
        kept = [segment for segment in self.segments if segment.start < self.consumed]
        segments = [_widened(segment, len(sources)) for segment in (*kept, Segment(self.consumed, values))]
        return replace(self, sources=sources, segments=tuple(segments))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return {
            "algorithm": self.algorithm,
            "seed": self.seed,
            "context": self.context,
            "packing": self.packing,
            "consumed": self.consumed,
            "sources": [[source.fingerprint, source.sequences] for source in self.sources],
            "segments": [[segment.start, *segment.weights] for segment in self.segments],
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Cursor:
        """Raises UserError if the order was made by another version of the algorithm."""
        if values["algorithm"] != ALGORITHM:
            raise UserError(
                f"this run's data order is of version {values['algorithm']}; this megagpt makes version {ALGORITHM}.",
                "Go on with the megagpt that began the run, or begin a new run.",
            )
        sources = tuple(Source(str(fingerprint), int(count)) for fingerprint, count in values["sources"])
        segments = tuple(Segment(int(start), tuple(weights)) for start, *weights in values["segments"])
        return Cursor(**{**values, "sources": sources, "segments": segments})


def start(*, seed: int, context: int, packing: Packing, weights: Mapping[Source, int]) -> Cursor:
    """The cursor of a run that has consumed nothing. Raises UserError as Cursor.with_mixture."""
    empty = Cursor(
        algorithm=ALGORITHM, seed=seed, context=context, packing=packing, consumed=0, sources=(), segments=()
    )
    return empty.with_mixture(weights)


def _widened(segment: Segment, sources: int) -> Segment:
    return Segment(segment.start, segment.weights + (0,) * (sources - len(segment.weights)))


def sequences(cursor: Cursor, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index into cursor.sources, sequence of that corpus) of each position: int64 arrays, pure.

    Positions may lie anywhere from 0, before or after cursor.consumed. Raises ValueError below 0.
    """
    positions = np.asarray(positions, dtype=np.int64)
    if positions.size and positions.min() < 0:
        raise ValueError("positions in the stream count from 0")
    corpus, ordinal = _mixed(cursor.segments, positions)
    sequence = np.empty_like(ordinal)
    for number, source in enumerate(cursor.sources):
        mine = np.flatnonzero(corpus == number)
        epoch, index = np.divmod(ordinal[mine], source.sequences)
        epochs, which = np.unique(epoch, return_inverse=True)
        keys = [_keys(cursor.seed, source.fingerprint, value) for value in epochs.tolist()]
        if keys:
            sequence[mine] = _permuted(index, source.sequences, np.stack(keys, axis=1)[:, which])
    return corpus, sequence


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


def _keys(seed: int, fingerprint: str, epoch: int) -> np.ndarray:
    digest = hashlib.shake_256(f"{seed}:{fingerprint}:{epoch}".encode()).digest(8 * _ROUNDS)
    return np.frombuffer(digest, dtype="<u8")


def _permuted(indices: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """The images of `indices` [n] under the permutations of [0, size) that the keys [rounds, n] name."""
    bits = max(2, (size - 1).bit_length())
    images = _feistel(indices.astype(np.uint64), bits, keys)
    outside = np.flatnonzero(images >= size)
    while len(outside):
        images[outside] = _feistel(images[outside], bits, keys[:, outside])
        outside = outside[images[outside] >= size]
    return images.astype(np.int64)


def _feistel(values: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """One pass of the network over [0, 2**bits). An even number of rounds restores the widths of the halves."""
    right_bits, left_bits = bits // 2, bits - bits // 2
    left, right = values >> np.uint64(right_bits), values & np.uint64((1 << right_bits) - 1)
    for key in keys:
        mixed = _splitmix64(right + key) & np.uint64((1 << left_bits) - 1)
        left, right = right, left ^ mixed
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


def _splitmix64(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
