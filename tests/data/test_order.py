from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data import order
from megagpt.data.order import Cursor, Source, sequences
from megagpt.errors import UserError

A, B, C = Source("a" * 64, 1000), Source("b" * 64, 7), Source("c" * 64, 10**9)


def start(weights: dict[Source, int], seed: int = 1) -> Cursor:
    return order.start(seed=seed, context=2048, packing="chunk", weights=weights)


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


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_kills_ranks_batches_and_mixtures_change_nothing_and_lose_nothing(data: st.DataObject) -> None:
    """A run that is cut, resumed on other ranks, and mixed anew reads each corpus in its own order, once an epoch."""
    pool = [Source(str(number), data.draw(st.integers(1, 60))) for number in range(4)]
    mixtures = st.dictionaries(st.sampled_from(pool), st.integers(1, 9), min_size=1)
    cursor = start(data.draw(mixtures))
    read: list[tuple[int, int]] = []
    for _ in range(data.draw(st.integers(1, 8))):
        ranks = data.draw(st.sampled_from([1, 2, 3, 8]))
        batch = ranks * data.draw(st.integers(1, 6))
        for _ in range(data.draw(st.integers(0, 4))):
            share = batch // ranks
            begins = [cursor.consumed + rank * share for rank in range(ranks)]
            read += [pair for begin in begins for pair in at(cursor, begin, begin + share)]
            cursor = cursor.advanced(batch)
        cursor = Cursor.from_dict(json.loads(json.dumps(cursor.to_dict())))  # a kill, and the checkpoint read again
        cursor = cursor.with_mixture(data.draw(mixtures))
    assert at(cursor, 0, cursor.consumed) == read, "the last state still knows the whole past"
    for number, source in enumerate(cursor.sources):
        mine = [sequence for corpus, sequence in read if corpus == number]
        alone = [sequence for _, sequence in at(start({source: 1}), 0, len(mine))]
        assert mine == alone, "a corpus's own order, with no sequence repeated or left out"


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
