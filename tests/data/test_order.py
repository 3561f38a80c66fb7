from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data import order
from megagpt.data.order import Cursor, Source, sequences
from megagpt.errors import UserError

A, B, C = Source("a" * 64, 1000), Source("b" * 64, 7), Source("c" * 64, 10**9)


def start(weights: dict[Source, int], seed: int = 1, window: int | None = None) -> Cursor:
    return order.start(seed=seed, context=2048, packing="chunk", weights=weights, window=window)


def at(cursor: Cursor, first: int, stop: int) -> list[tuple[int, int]]:
    corpus, sequence = sequences(cursor, np.arange(first, stop))
    return list(zip(corpus.tolist(), sequence.tolist(), strict=True))


def test_the_order_of_version_1_is_this_and_no_other() -> None:
    cursor = start({A: 5, B: 3, C: 2})
    assert at(cursor, 0, 12) == GOLDEN
    assert at(cursor.advanced(5).with_mixture({B: 1}), 8, 12) == GOLDEN_B
    assert at(start({C: 1}, seed=2), 10**12, 10**12 + 3) == GOLDEN_FAR


def plain_permutation(index: int, size: int, seed: int, fingerprint: str, epoch: int) -> int:
    """The documented shuffle for one number, without numpy."""
    word = 2**64 - 1
    digest = hashlib.shake_256(f"{seed}:{fingerprint}:{epoch}".encode()).digest(48)
    bits = max(2, (size - 1).bit_length())
    while True:
        low = bits // 2
        left, right = index >> low, index & (2**low - 1)
        for number in range(6):
            mixed = (right + int.from_bytes(digest[8 * number : 8 * number + 8], "little")) & word
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
                mixed = (mixed ^ (mixed >> shift)) * factor & word
            left, right = right, left ^ (mixed & (2 ** (bits - low) - 1))
            low = bits - low
        index = left << low | right
        if index < size:
            return index


@pytest.mark.parametrize("size", [1, 2, 3, 100, 1025, 10**12])
def test_the_documented_shuffle_in_plain_python_gives_the_same(size: int) -> None:
    _, sequence = sequences(start({Source("f", size): 1}, seed=7), np.arange(3 * size if size < 100 else 30))
    assert sequence.tolist() == [
        plain_permutation(position % size, size, 7, "f", position // size) for position in range(len(sequence))
    ]


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 5))
def test_each_epoch_is_a_permutation_of_all_sequences(size: int, seed: int, epoch: int) -> None:
    cursor = start({Source("f", size): 3}, seed=seed)
    _, sequence = sequences(cursor, np.arange(epoch * size, (epoch + 1) * size))
    assert sorted(sequence.tolist()) == list(range(size))


def test_epochs_seeds_and_corpora_are_shuffled_differently() -> None:
    orders = [
        tuple(sequences(start({Source(name, 500): 1}, seed), np.arange(first, first + 500))[1])
        for name in ("f", "g")
        for seed in (1, 2)
        for first in (0, 500)
    ]
    assert len(set(orders)) == 8


@pytest.mark.parametrize("size", [4096, 999_983, 10**11])
def test_the_shuffle_is_far_from_order(size: int) -> None:
    _, sequence = sequences(start({Source("f", size): 1}), np.arange(min(size, 50_000)))
    assert abs(np.abs(np.diff(sequence)).mean() / size - 1 / 3) < 0.02
    assert abs(np.corrcoef(sequence[:-1], sequence[1:])[0, 1]) < 0.04
    assert abs(sequence.mean() / size - 0.5) < 0.01


weights_lists = st.lists(st.integers(1, 50), min_size=1, max_size=20)


@settings(deadline=None)
@given(weights_lists)
def test_the_mixture_keeps_its_shares_in_every_prefix_and_exactly_in_every_period(weights: list[int]) -> None:
    cursor = start({Source(str(number), 10**6): weight for number, weight in enumerate(weights)})
    corpus, _ = sequences(cursor, np.arange(2 * sum(weights)))
    taken = np.cumsum(corpus[:, None] == np.arange(len(weights)), axis=0)
    ideal = np.arange(1, len(corpus) + 1)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(taken - ideal).max() < 2
    assert taken[sum(weights) - 1].tolist() == weights
    assert taken[-1].tolist() == [2 * weight for weight in weights]


@settings(deadline=None)
@given(weights_lists, st.integers(0, 10**6))
def test_counting_a_prefix_agrees_with_walking_it(weights: list[int], length: int) -> None:
    length %= 3 * sum(weights)
    corpus, _ = order._interleaved(weights, np.arange(length))
    assert order._counts(weights, length).tolist() == np.bincount(corpus, minlength=len(weights)).tolist()


def plain_interleave(weights: list[int]) -> Iterator[int]:
    """The documented mixture for one position after another, without numpy: the corpus of each."""
    heaviest_first = sorted((k for k in range(len(weights)) if weights[k]), key=lambda k: -weights[k])
    for position in itertools.count():
        rest, left, taken = sum(weights), position % sum(weights), None
        for k in heaviest_first:
            share = (2 * left * weights[k] + rest) // (2 * rest)
            if taken is None and (2 * (left + 1) * weights[k] + rest) // (2 * rest) > share:
                taken = k
            left, rest = left - share, rest - weights[k]
        assert taken is not None
        yield taken


@dataclass
class Walk:
    """The stream as a plain loop over positions: what the formula is compared with."""

    seed: int
    sources: list[Source] = field(default_factory=list)
    given: list[int] = field(default_factory=list)
    mixture: Iterator[int] = field(default_factory=lambda: iter(()))
    weights: list[int] = field(default_factory=list)
    position: int = 0
    skips: list[tuple[int, int]] = field(default_factory=list)

    def mix(self, weights: dict[Source, int]) -> None:
        for source in weights:
            if source not in self.sources:
                self.sources.append(source)
                self.given.append(0)
        values = [weights.get(source, 0) for source in self.sources]
        values = [value // math.gcd(*values) for value in values]
        if values != self.weights + [0] * (len(values) - len(self.weights)):
            self.weights, self.mixture = values, plain_interleave(values)

    def next(self) -> tuple[int, int]:
        while True:
            number = next(self.mixture)
            ordinal, source = self.given[number], self.sources[number]
            self.given[number] += 1
            self.position += 1
            if not any(first < self.position <= stop for first, stop in self.skips):
                epoch, index = divmod(ordinal, source.sequences)
                return number, plain_permutation(index, source.sequences, self.seed, source.fingerprint, epoch)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_kills_ranks_batches_mixtures_and_skips_give_what_a_plain_loop_gives(data: st.DataObject) -> None:
    """A run that is cut, resumed on other ranks, mixed anew and told to skip reads what the definition says."""
    pool = [Source(str(number), data.draw(st.integers(1, 60))) for number in range(4)]
    mixtures = st.dictionaries(st.sampled_from(pool), st.integers(1, 9), min_size=1)
    weights = data.draw(mixtures)
    cursor, walk = start(weights), Walk(seed=1)
    walk.mix(weights)
    read: list[tuple[int, int]] = []
    expected: list[tuple[int, int]] = []
    for _ in range(data.draw(st.integers(1, 6))):
        ranks = data.draw(st.sampled_from([1, 2, 3, 8]))
        batch = ranks * data.draw(st.integers(1, 6))
        if data.draw(st.booleans()):
            first = cursor.consumed + data.draw(st.integers(0, 30))
            stop = first + data.draw(st.integers(1, 20))
            walk.skips.append((cursor.passed(first), cursor.passed(stop - 1) + 1))
            cursor = cursor.skipping(first, stop)
        for _ in range(data.draw(st.integers(0, 3))):
            share = batch // ranks
            begins = [cursor.consumed + rank * share for rank in range(ranks)]
            read += [pair for begin in begins for pair in at(cursor, begin, begin + share)]
            expected += [walk.next() for _ in range(batch)]
            cursor = cursor.advanced(batch)
        cursor = Cursor.from_dict(json.loads(json.dumps(cursor.to_dict())))  # a kill, and the checkpoint read again
        weights = data.draw(mixtures)
        cursor = cursor.with_mixture(weights)
        while walk.position < cursor.passed(cursor.consumed):  # what is skipped right here has the old mixture
            next_number = next(walk.mixture)
            walk.given[next_number] += 1
            walk.position += 1
        walk.mix(weights)
    assert read == expected
    assert at(cursor, 0, cursor.consumed) == read, "the last state still knows the whole past"


def test_thousands_of_interrupted_runs_lose_and_repeat_nothing() -> None:
    """1,500 runs: killed anywhere, ranks and batches changed, corpora added, taken away and weighed anew."""
    generator = np.random.default_rng(0)
    for _ in range(1500):
        pool = [Source(str(number), int(generator.integers(1, 40))) for number in range(3)]
        cursor, parts = None, []
        for _ in range(4):
            some = [source for source in pool if generator.random() < 0.7] or pool[:1]
            weights = {source: int(generator.integers(1, 6)) for source in some}
            cursor = start(weights) if cursor is None else cursor.with_mixture(weights)
            ranks = int(generator.choice([1, 2, 3, 8]))
            share = int(generator.integers(1, 4))
            done = int(generator.integers(0, 5)) * ranks * share
            each = np.arange(cursor.consumed, cursor.consumed + done).reshape(-1, ranks, share)
            where = each[:, generator.permutation(ranks)].reshape(-1)  # a rank after another, in any order
            parts.append((where, *sequences(cursor, where)))
            cursor = cursor.advanced(done)
        assert cursor is not None
        positions, corpus, sequence = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        assert sorted(positions.tolist()) == list(range(cursor.consumed))
        by_position = np.argsort(positions)
        corpus, sequence = corpus[by_position], sequence[by_position]
        for number, source in enumerate(cursor.sources):
            mine = sequence[corpus == number]
            _, alone = sequences(start({source: 1}), np.arange(len(mine)))
            assert mine.tolist() == alone.tolist(), "a corpus's own order, with no sequence repeated or left out"


def test_a_skipped_range_is_never_read_and_what_was_before_it_stays() -> None:
    plain = start({A: 5, B: 3}).advanced(20)
    cursor = plain.skipping(30, 34).skipping(28, 32).skipping(40, 41)
    assert cursor.skipped == ((28, 36), (48, 49)), "positions count what is served: 28 to 32 held 28, 29, 34 and 35"
    served = at(cursor, 0, 60)
    everything = at(plain, 0, 69)
    assert served == everything[:28] + everything[36:48] + everything[49:69]
    assert cursor.consumed == 20
    for first, stop in ((19, 25), (30, 30)):
        with pytest.raises(UserError, match="cannot be skipped: 20 sequences were consumed"):
            cursor.skipping(first, stop)


def test_ranges_that_touch_become_one_and_more_than_64_are_refused() -> None:
    cursor = start({A: 1})
    for _ in range(100):
        cursor = cursor.skipping(0, 3)
    assert cursor.skipped == ((0, 300),)
    assert start({A: 1}).skipping(23, 24).skipping(8, 23).skipped == ((8, 24),), "one that ends where another begins"
    for number in range(63):
        cursor = cursor.skipping(10 * (number + 1), 10 * (number + 1) + 1)
    assert len(json.dumps(cursor.to_dict())) < 2048
    with pytest.raises(UserError, match="the run skips 64 ranges"):
        cursor.skipping(5000, 5001)
    assert cursor.skipping(600, 10**6).skipped[-1][1] > 10**6, "one that swallows others is no further one"


def test_a_state_without_skips_and_windows_is_still_read() -> None:
    cursor = start({A: 5, B: 3}).advanced(7)
    old = cursor.to_dict()
    for key in ("skipped", "window", "max_epochs"):
        del old[key]
    old["sources"] = [source[:2] for source in old["sources"]]
    assert Cursor.from_dict(old) == cursor


def test_reading_a_corpus_too_often_is_refused_with_the_figures() -> None:
    cursor = replace(start({A: 1, B: 1}), max_epochs=2)
    cursor.check_repetition(28)
    assert cursor.epochs(28) == {A: 0.014, B: 2.0}
    with pytest.raises(
        UserError, match=r"corpus bbbbbbbbbbbb \(7 sequences\) 2\.14 times; data.max_epochs = 2 allows"
    ):
        cursor.check_repetition(30)
    replace(cursor, max_epochs=None).check_repetition(10**9)
    assert cursor.skipping(0, 10).epochs(18) == {A: 0.014, B: 2.0}, "what is skipped counts as read"


windowed_cases = st.tuples(st.integers(1, 2000), st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**63))


@settings(deadline=None)
@given(windowed_cases)
def test_a_windowed_epoch_is_a_permutation_that_reads_few_runs_at_a_time(case: tuple[int, int, int, int]) -> None:
    size, runs, window, seed = case
    source = Source("f", size, runs)
    cursor = start({source: 3}, seed=seed, window=window)
    _, sequence = sequences(cursor, np.arange(2 * size))
    assert sorted(sequence[:size].tolist()) == sorted(sequence[size:].tolist()) == list(range(size))
    run = -(-size // runs)
    if window < runs:
        for first in range(0, size, window * run):
            assert len(np.unique(sequence[first : min(size, first + window * run)] // run)) <= window + 2
    else:
        assert sequence.tolist() == sequences(start({source: 3}, seed=seed), np.arange(2 * size))[1].tolist()


def test_the_windowed_order_is_this_and_no_other() -> None:
    cursor = start({Source("c" * 64, 10**9, 1000): 2, Source("a" * 64, 1000, 7): 1}, window=3)
    assert at(cursor, 0, 6) == GOLDEN_WINDOWED
    assert at(cursor, 10**10, 10**10 + 3) == GOLDEN_WINDOWED_FAR
    shuffled = np.random.default_rng(0).permutation(5000)
    together, alone = sequences(cursor, shuffled), sequences(cursor, np.arange(5000))
    assert [part.tolist() for part in together] == [part[shuffled].tolist() for part in alone]


def test_the_same_mixture_again_changes_nothing_and_an_unused_one_is_replaced() -> None:
    cursor = start({A: 4, B: 2}).advanced(9)
    assert cursor.with_mixture({B: 1, A: 2}) == cursor
    changed = cursor.with_mixture({A: 1}).with_mixture({A: 1, C: 1})
    assert [segment.start for segment in changed.segments] == [0, 9]
    assert changed.segments[0].weights == (2, 1, 0)


def test_the_state_is_small_and_survives_json() -> None:
    sources = [Source(f"{number:064x}", 10**9 + number) for number in range(16)]
    cursor = start({source: 1000 + number for number, source in enumerate(sources)}).advanced(10**10)
    for change in range(8):
        cursor = cursor.with_mixture({source: 10 + change + 3 * n for n, source in enumerate(sources)}).advanced(10**9)
    text = json.dumps(cursor.to_dict())
    assert len(text) <= 4096
    assert Cursor.from_dict(json.loads(text)) == cursor


def test_neighbouring_positions_may_be_asked_for_in_any_order_and_company() -> None:
    cursor = start({A: 5, B: 3, C: 2}).advanced(40).with_mixture({B: 1, C: 1})
    positions = np.random.default_rng(0).permutation(200)
    corpus, sequence = sequences(cursor, positions)
    single = [at(cursor, position, position + 1)[0] for position in positions.tolist()]
    assert list(zip(corpus.tolist(), sequence.tolist(), strict=True)) == single


def test_a_state_of_another_version_of_the_algorithm_is_refused() -> None:
    with pytest.raises(UserError, match="data order is of version 2; this megagpt makes version 1"):
        Cursor.from_dict({**start({A: 1}).to_dict(), "algorithm": 2})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({A: 0}, "corpus aaaaaaaaaaaa has the weight 0; it must be at least 1"),
        ({Source("a" * 64, 5): 1}, "corpus aaaaaaaaaaaa had 1,000 sequences and now has 5"),
        ({Source("d" * 64, 0): 1}, "corpus dddddddddddd has no sequence of 2048 tokens"),
        ({A: 2**30, B: 1}, "the weights of the mixture add up to"),
        ({}, "the weights of the mixture add up to 0"),
    ],
)
def test_impossible_mixtures_are_refused(weights: dict[Source, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        start({A: 1}).with_mixture(weights)


def test_positions_below_0_are_refused() -> None:
    with pytest.raises(ValueError, match="count from 0"):
        sequences(start({A: 1}), np.array([-1]))


GOLDEN = [
    (0, 96),
    (1, 1),
    (0, 281),
    (2, 959094567),
    (0, 697),
    (1, 3),
    (0, 171),
    (2, 197217676),
    (0, 293),
    (1, 5),
    (0, 42),
    (1, 4),
]
GOLDEN_B = [(1, 2), (1, 6), (1, 0), (1, 3)]
GOLDEN_FAR = [(0, 504371939), (0, 678602097), (0, 945729218)]
GOLDEN_WINDOWED = [(0, 629070805), (1, 936), (0, 285101566), (0, 285709972), (1, 473), (0, 338418898)]
GOLDEN_WINDOWED_FAR = [(1, 113), (0, 740919453), (0, 676121020)]
