"""Numbers as people read them."""

import pytest

from megagpt.report.text import count, duration, share


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (7, "7"), (0.12345, "0.1235"), (999, "999"), (1234, "1.234k"), (12_345, "12.35k"),
                         (124_439_808, "124.4M"), (175e9, "175B"), (3e12, "3T")],
)  # fmt: skip
def test_a_count_has_four_digits_and_a_suffix(number, text):
    assert count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.25, "0.2 s"), (48, "48 s"), (59.7, "1 min 00 s"), (725, "12 min 05 s"), (3599.6, "1 h 00 min"),
     (11_220, "3 h 07 min"), (187_200, "2 d 04 h"), (float("inf"), "unknown"), (float("nan"), "unknown")],
)  # fmt: skip
def test_a_duration_has_its_two_largest_units(seconds, text):
    assert duration(seconds) == text


def test_a_share_is_a_percentage_and_an_unknown_one_a_question_mark():
    assert share(0.4123) == "41.2%"
    assert share(None) == "?"
