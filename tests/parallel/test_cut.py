from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.config import Model
from megagpt.parallel.cut import CUTS, Place, cut_of, kv_head_of_each_query, kv_heads_of, vocabulary_rows
from megagpt.parallel.place import whole_shapes

MODEL = Model(layers=2, width=48, heads=12, kv_heads=3, vocabulary=101, context=8, feed_forward="swiglu", hidden=64)
NAMES = whole_shapes(MODEL)


@st.composite
def models(draw: st.DrawFn) -> tuple[Model, int]:
    """A model and a number of tensor ranks that its heads and hidden features divide among."""
    tensor = draw(st.integers(1, 6))
    kv_heads = draw(st.integers(1, 6))
    heads = draw(st.integers(1, 6)) * kv_heads
    heads *= tensor if heads % tensor else 1
    model = dataclasses.replace(MODEL, width=4 * heads, heads=heads, kv_heads=kv_heads, hidden=tensor * 5)
    return dataclasses.replace(model, vocabulary=draw(st.integers(1, 400))), tensor


@given(models())
def test_every_row_and_column_is_owned_by_one_rank(case):
    model, tensor = case
    sizes = {
        "embedding.token": vocabulary_rows(model, tensor),
        "attention.query_key_value": (model.heads + 2 * model.key_value_heads()) * model.head_width(),
        "attention.output": model.width,
        "feed_forward.up": model.feed_forward_width(),
        "feed_forward.gate_up": 2 * model.feed_forward_width(),
        "feed_forward.down": model.feed_forward_width(),
        "head.output": vocabulary_rows(model, tensor),
    }
    for name, size in sizes.items():
        owned = [
            index
            for rank in range(tensor)
            for part in CUTS[name](model, Place(rank, tensor)).ranges
            if part.owned
            for index in range(part.start, part.stop)
        ]
        assert sorted(owned) == list(range(size)), name


@given(models())
def test_every_query_head_finds_the_key_and_value_head_of_the_whole_model(case):
    model, tensor = case
    share = model.heads // model.key_value_heads()
    for rank in range(tensor):
        place = Place(rank, tensor)
        mine, kept = model.heads // tensor, kv_heads_of(model, place)
        found = kv_head_of_each_query(model, place) or [n // (mine // len(kept)) for n in range(mine)]
        assert [kept.start + local for local in found] == [(rank * mine + n) // share for n in range(mine)]


@given(models())
def test_ranks_have_as_many_rows_of_the_vocabulary_and_together_enough(case):
    model, tensor = case
    rows = vocabulary_rows(model, tensor)
    assert rows >= model.vocabulary
    assert rows % (64 * tensor) == 0
    assert rows - model.vocabulary < 64 * tensor


@pytest.mark.parametrize("name", NAMES)
def test_norms_positions_and_biases_of_column_cuts_are_on_every_rank(name):
    uncut = "norm" in name or "position" in name or name.endswith(("output.bias", "down.bias"))
    assert (cut_of(name, MODEL, Place(0, 4)) is None) == uncut
