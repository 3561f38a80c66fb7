from __future__ import annotations

import dataclasses

import pytest

from megagpt import config
from megagpt.checks import checked
from megagpt.config import Data, Model, Optim, Parallel, Run, Train
from megagpt.errors import UserError

GOOD = Run(data=Data(mixture={"corpus": 1}))


@pytest.mark.parametrize("name", config.preset_names())
def test_every_preset_passes_once_it_has_data(name):
    run = config.load(name)
    mixture = run.data.mixture or {"corpus": 1}
    checked(dataclasses.replace(run, data=dataclasses.replace(run.data, mixture=mixture)))


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("model", Model(width=770), "model.width = 770 is not divisible by model.heads = 12"),
        ("model", Model(width=770), "Widths that are: 768 or 780"),
        ("model", Model(kv_heads=5), "model.heads = 12 is not divisible by model.kv_heads = 5"),
        ("model", Model(kv_heads=5), "4 or 6"),
        ("model", Model(positions="rotary", width=36, heads=12), "even head width"),
        ("model", Model(dropout=1.0), "model.dropout = 1.0 must be from 0 to below 1"),
        ("model", Model(layers=0), "model.layers = 0 must be at least 1"),
        ("model", Model(window=0), "model.window = 0 must be at least 1"),
        ("train", Train(global_batch=100), "train.global_batch = 100 is not a multiple"),
        ("train", Train(global_batch=100), "96 or 104"),
        ("train", Train(ramp_start=15, ramp_tokens=10), "does not reach train.global_batch = 512 in whole steps"),
        ("train", Train(ramp_start=12, ramp_increment=4, ramp_tokens=10), "train.ramp_start = 12 is not a multiple"),
        ("train", Train(steps=0), "train.steps = 0 must be at least 1"),
        ("optim", Optim(lr=-1.0), "optim.lr = -1.0 must be above 0"),
        ("optim", Optim(lr=float("nan")), "optim.lr = nan must be above 0"),
        ("optim", Optim(beta2=1.0), "optim.beta2 = 1.0"),
        ("optim", Optim(warmup_tokens=10**9), "leaves nothing to decay over"),
        (
            "parallel",
            Parallel(pipeline=2, zero_stage=2),
            "parallel.zero_stage = 2 does not work with parallel.pipeline",
        ),
        ("parallel", Parallel(pipeline=2, zero_stage=3), "Use parallel.zero_stage 1, or parallel.pipeline 1"),
        ("parallel", Parallel(pipeline=13), "more than model.layers = 12"),
        ("parallel", Parallel(data=0), "parallel.data = 0 must be at least 1"),
        ("data", Data(), "data.mixture names no corpus"),
        ("data", Data(mixture={"a": 1, "b": 0}), "gives b the weight 0"),
    ],
)
def test_a_broken_rule_is_refused_with_the_setting_and_the_remedy(section, values, words):
    with pytest.raises(UserError) as caught:
        checked(dataclasses.replace(GOOD, **{section: values}))
    assert words in str(caught.value)


def test_a_legal_run_comes_back_unchanged():
    assert checked(GOOD) is GOOD
