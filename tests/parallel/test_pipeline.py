from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt import config
from megagpt.config import Model
from megagpt.ledger import flops_per_token, layer_flops, layer_parameters, parameters
from megagpt.parallel.pipeline import stage_bounds


def largest(model: Model, bounds: list[int]) -> tuple[float, int]:
    flops, count = layer_flops(model), layer_parameters(model)
    stages = list(itertools.pairwise(bounds))
    return max(sum(flops[a:b]) for a, b in stages), max(sum(count[a:b]) for a, b in stages)


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.sampled_from([64, 4096, 50_000]), st.sampled_from([None, 8]))
def test_no_other_cut_has_a_smaller_largest_stage(layers, stages, vocabulary, window):
    model = Model(layers=layers, width=64, heads=4, vocabulary=vocabulary, context=64, window=window)
    stages = min(stages, layers)
    every = [[0, *inner, layers + 2] for inner in itertools.combinations(range(1, layers + 2), stages - 1)]
    bounds = stage_bounds(model, stages)
    assert bounds in every
    assert largest(model, bounds)[0] == pytest.approx(min(largest(model, other)[0] for other in every), rel=1e-12)


def test_a_large_vocabulary_takes_blocks_away_from_the_last_stage():
    model = Model(layers=12, width=768, heads=12, vocabulary=50_257)
    bounds = stage_bounds(model, 4)
    assert bounds[-1] - bounds[-2] < bounds[1] - bounds[0]


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ValueError, match="3 layers cannot make 4 stages"):
        stage_bounds(Model(layers=1), 4)


@pytest.mark.parametrize("name", config.preset_names())
def test_the_layers_of_the_ledger_add_up_to_its_totals(name):
    model = config.load(name).model
    assert sum(layer_flops(model)) == pytest.approx(flops_per_token(model).forward, rel=1e-12)
    copies = model.vocabulary * model.width if model.tied else 0
    assert sum(layer_parameters(model)) - copies == parameters(model).total()
