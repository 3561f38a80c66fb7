"""The count of visited tiles is that of the tiles in which any query sees any key."""

import pytest

from megagpt.kernels.visits import tiles_visited

MASKS = [
    {}, {"window": 1}, {"window": 7}, {"window": 16}, {"lengths": [1, 1, 30, 3, 62]},
    {"lengths": [40, 57], "window": 9}, {"causal": False}, {"causal": False, "window": 5},
    {"causal": False, "lengths": [13, 84]},
]  # fmt: skip


def by_definition(T, rows, columns, *, causal=True, window=None, lengths=None):
    document = [number for number, length in enumerate(lengths or [T]) for _ in range(length)]
    seen = {
        (i // rows, j // columns)
        for i in range(T)
        for j in range(T)
        if document[i] == document[j] and (j <= i or not causal) and (window is None or abs(i - j) < window)
    }
    return len(seen)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (32, 8), (8, 32)])
def test_exactly_the_tiles_with_a_visible_pair_are_counted(mask, rows, columns):
    assert tiles_visited(97, rows=rows, columns=columns, **mask) == by_definition(97, rows, columns, **mask)


@pytest.mark.parametrize("window", [64, 256, 1024])
@pytest.mark.parametrize(("rows", "columns"), [(128, 64), (64, 64), (128, 128)])
def test_a_band_of_whole_tiles_visits_its_width_and_one_tile_a_row_at_most(window, rows, columns):
    T = 4096
    dense = T // rows * (T // columns)
    allowed = -(-window // columns) * columns + rows
    assert tiles_visited(T, rows=rows, columns=columns, window=window) <= dense * allowed / T


def test_documents_visit_what_each_would_alone():
    alone = tiles_visited(512, rows=64, columns=32)
    assert tiles_visited(2048, rows=64, columns=32, lengths=[512] * 4) == 4 * alone
