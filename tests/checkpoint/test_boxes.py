from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megagpt.checkpoint.boxes import Box, fault_in_tiling, of_range, overlap

shapes = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


@st.composite
def ranges(draw):
    shape = draw(shapes)
    size = math.prod(shape)
    start = draw(st.integers(0, size))
    return shape, start, draw(st.integers(0, size - start))


@given(ranges())
def test_the_boxes_of_a_range_are_its_elements_in_order(case):
    shape, start, count = case
    numbers = np.arange(math.prod(shape)).reshape(shape)
    found = [number for box in of_range(shape, start, count) for number in numbers[box.slices()].ravel()]
    assert found == list(range(start, start + count))


@given(ranges())
def test_a_range_of_a_matrix_is_at_most_three_boxes(case):
    shape, start, count = case
    if len(shape) == 2:
        assert len(of_range(shape, start, count)) <= 3


@given(shapes, st.lists(st.integers(0, 625), max_size=4))
def test_cutting_a_tensor_anywhere_tiles_it_and_a_missing_or_doubled_piece_does_not(shape, cuts):
    size = math.prod(shape)
    edges = sorted({0, size, *(cut for cut in cuts if cut < size)})
    boxes = [box for a, b in itertools.pairwise(edges) for box in of_range(shape, a, b - a)]
    assert fault_in_tiling(shape, boxes) is None
    assert "elements are there" in (fault_in_tiling(shape, boxes[1:]) or "")
    assert "overlap" in (fault_in_tiling(shape, [*boxes, boxes[-1]]) or "")


def test_a_box_outside_the_shape_is_found():
    assert "outside" in (fault_in_tiling((2, 2), [Box((0, 1), (2, 2))]) or "")


def test_the_overlap_of_two_boxes_is_what_both_hold():
    assert overlap(Box((0, 0), (2, 3)), Box((1, 2), (5, 5))) == Box((1, 2), (1, 1))
    assert overlap(Box((0, 0), (2, 3)), Box((2, 0), (1, 3))) is None
