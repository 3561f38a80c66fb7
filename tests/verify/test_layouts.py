from __future__ import annotations

import pytest

from megagpt.errors import UserError
from megagpt.verify.layouts import EIGHT, Layout, defaults, parse


@pytest.mark.parametrize("word", EIGHT)
def test_a_layout_is_written_as_it_is_read_and_eight_ranks_are_eight(word):
    assert str(parse(word)) == word
    assert parse(word).ranks() == 8


def test_what_a_word_leaves_out_is_zero_1_and_one_micro_batch():
    assert parse("1x2x3") == Layout(data=1, pipeline=2, tensor=3, zero_stage=1, accumulation=1)


@pytest.mark.parametrize("word", ["2x2", "0x1x1", "2x2x2/z4", "2x2x2/a0", "2x2x2/fast", ""])
def test_a_word_that_is_no_layout_is_refused(word):
    with pytest.raises(UserError, match="is no layout|means nothing"):
        parse(word)


def test_a_small_world_gets_layouts_that_fit():
    assert all(layout.ranks() <= 2 for layout in defaults(2))
    assert len(defaults(8)) == 24
