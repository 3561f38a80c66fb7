"""Ticks of axes: round, in order, and about as many as asked for."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.report.axis import linear_axis, log_axis, round_step

values = st.lists(st.floats(-1e9, 1e9).filter(lambda value: value == 0 or abs(value) > 1e-9), min_size=1, max_size=5)


def labels(axis):
    return [label for _, label in axis.ticks]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (3.1, 10.4, ["2", "4", "6", "8", "10", "12"]),
        (0.0, 6e-4, ["0", "2e-4", "4e-4", "6e-4"]),
        (0.0, 1.3e-3, ["0", "5e-4", "1e-3", "1.5e-3"]),
        (0.0, 14_000.0, ["0", "5k", "10k", "15k"]),
        (0.0, 2.2e6, ["0", "500k", "1M", "1.5M", "2M", "2.5M"]),
        (3.12, 3.16, ["3.12", "3.13", "3.14", "3.15", "3.16"]),
        (-0.3, 0.2, ["-0.3", "-0.2", "-0.1", "0", "0.1", "0.2"]),
    ],
)
def test_ticks_are_labelled_as_a_person_would(low, high, expected):
    assert labels(linear_axis([low, high], start=0, end=100)) == expected


@given(values, st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_value_lies_on_its_axis(numbers, zero):
    axis = linear_axis(numbers, start=300, end=10, zero=zero)
    assert all(10 - 1e-6 <= axis.at(value) <= 300 + 1e-6 for value in numbers)
    positions = [position for position, _ in axis.ticks]
    assert positions == sorted(set(positions))
    assert 2 <= len(positions) <= 8
    if zero:
        assert axis.low <= 0 <= axis.high


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_every_positive_value_lies_on_its_logarithmic_axis(numbers):
    axis = log_axis(numbers, start=300, end=10)
    assert all(10 - 1e-6 <= axis.at(value) <= 300 + 1e-6 for value in numbers)
    assert 2 <= len(axis.ticks) <= 15


def test_a_tight_axis_ends_at_its_values():
    axis = linear_axis([1, 1200], start=0, end=100, tight=True)
    assert (axis.at(1), axis.at(1200)) == (0, 100)
    assert all(1 <= position <= 1200 for position, _ in axis.ticks)


def test_one_value_alone_has_an_axis():
    assert linear_axis([5.0], start=0, end=100).at(5.0) == pytest.approx(50)
    assert math.isfinite(linear_axis([0.0], start=0, end=100).at(0.0))


def test_a_logarithmic_axis_has_digits_between_near_decades_and_none_between_far_ones():
    assert labels(log_axis([0.4, 9.4], start=0, end=1)) == ["0.2", "0.5", "1", "2", "5", "10"]
    assert labels(log_axis([0.02, 900], start=0, end=1)) == ["0.01", "0.1", "1", "10", "100", "1000"]


@pytest.mark.parametrize(("step", "rounded"), [(0.7, 1), (1, 1), (1.1, 2), (2.5, 5), (7, 10), (0.0003, 0.0005)])
def test_steps_are_1_2_or_5(step, rounded):
    assert round_step(step) == pytest.approx(rounded)
