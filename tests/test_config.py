from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt import config
from megagpt.config import Data, Model, Report, Run, Train
from megagpt.errors import UserError


def test_every_preset_loads_and_its_toml_loads_back_equal(tmp_path):
    assert {"quickstart", "gpt3-125m", "gpt3-175b"} <= set(config.preset_names())
    for name in config.preset_names():
        run = config.load(name)
        (tmp_path / "run.toml").write_text(config.to_toml(run), encoding="utf-8")
        assert config.load(str(tmp_path / "run.toml")) == run


@given(st.text(), st.integers(1, 9), st.floats(1e-9, 1e9))
def test_any_text_survives_the_way_through_toml(tmp_path_factory, text, weight, std):
    run = Run(data=Data(mixture={text: weight}), report=Report(wandb=text), model=Model(init_std=std))
    path = tmp_path_factory.mktemp("toml") / "run.toml"
    path.write_text(config.to_toml(run), encoding="utf-8")
    assert config.load(str(path)) == run


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[model]\nlayer = 3", "no setting is called model.layer. Did you mean layers?"),
        ("[modle]\nlayers = 3", "no setting is called modle. Did you mean model?"),
        ("seed = 'one'", "seed = 'one' must be of type int"),
        ("[model]\nlayers = true", "model.layers = True must be of type int"),
        ("[model]\nnorm = 'batchnorm'", "model.norm = 'batchnorm' is not one of layernorm, rmsnorm"),
        ("model = 3", "model is a section"),
        ("[data]\nmixture = {a = 1.5}", "data.mixture = {'a': 1.5} must be a table"),
        ("[model", "is not TOML"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_setting(tmp_path, toml, words):
    path = tmp_path / "mine.toml"
    path.write_text(toml)
    with pytest.raises(UserError) as caught:
        config.load(str(path))
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_mistyped_preset_gets_a_suggestion():
    with pytest.raises(UserError, match=r"no preset or file 'gpt3-1.3'. Did you mean gpt3-1.3b\?"):
        config.load("gpt3-1.3")


def test_the_ramp_reaches_every_size_once_and_ends_at_the_global_batch():
    train = Train(ramp_start=16, ramp_increment=8, ramp_tokens=1_000_000, global_batch=64)
    sizes = [train.batch_at(tokens) for tokens in range(0, 1_000_000, 1000)]
    assert sizes[0] == 16
    assert sizes == sorted(sizes)
    assert sorted(set(sizes)) == list(range(16, 65, 8))
    assert train.batch_at(1_000_000) == 64


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 200_000), st.integers(1, 500_000))
def test_the_number_of_steps_equals_walking_through_the_run(increments, start, ramp_tokens, tokens):
    train = Train(
        tokens=tokens, ramp_start=start, ramp_increment=2, ramp_tokens=ramp_tokens, global_batch=start + 2 * increments
    )
    run = Run(train=train, model=Model(context=64))
    seen = steps = 0
    while seen < tokens:
        seen += train.batch_at(seen) * 64
        steps += 1
    assert config.steps_of(run) == steps


def test_train_steps_stops_a_run_early_but_never_makes_it_longer():
    run = Run(train=Train(tokens=10_000, global_batch=1), model=Model(context=100))
    assert config.steps_of(run) == 100
    for steps, expected in [(7, 7), (1000, 100)]:
        shorter = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=steps))
        assert config.steps_of(shorter) == expected
