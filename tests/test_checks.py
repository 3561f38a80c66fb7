from __future__ import annotations

import dataclasses

import pytest

from megagpt import config
from megagpt.checks import check_world, checked, costs_of
from megagpt.config import Checkpoint, Data, Model, Optim, Parallel, Run, Train
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
        ("parallel", Parallel(tensor=5), "model.heads = 12 cannot be cut over parallel.tensor = 5 ranks"),
        ("parallel", Parallel(tensor=5), "Use parallel.tensor 4 or 6, or of 5 ranks data x pipeline x tensor = "),
        ("parallel", Parallel(tensor=8, data=2), "data x pipeline x tensor = 4 x 1 x 4 or 2 x 2 x 4"),
        ("parallel", Parallel(offload=True, zero_stage=0), "parallel.offload needs optimizer state cut by ZeRO"),
        ("parallel", Parallel(offload=True, pipeline=2), "or no parallel.offload"),
        ("train", Train(guard_every=-1), "train.guard_every = -1 must be at least 0"),
        ("parallel", Parallel(data=0), "parallel.data = 0 must be at least 1"),
        ("checkpoint", Checkpoint(keep=0), "checkpoint.keep = 0 must be at least 1"),
        ("checkpoint", Checkpoint(local_every=0), "checkpoint.local_every = 0 must be at least 1"),
        ("data", Data(), "data.mixture names no corpus"),
        ("data", Data(mixture={"a": 1}, max_epochs=0), "data.max_epochs = 0 must be at least 1"),
        ("data", Data(mixture={"a": 1}, window=4, packing="best_fit"), 'data.window needs data.packing = "chunk"'),
        ("data", Data(mixture={"a": 1, "b": 0}), "gives b the weight 0"),
    ],
)
def test_a_broken_rule_is_refused_with_the_setting_and_the_remedy(section, values, words):
    with pytest.raises(UserError) as caught:
        checked(dataclasses.replace(GOOD, **{section: values}))
    assert words in str(caught.value)


def test_tokens_that_sequence_parallelism_cannot_share_are_refused():
    run = dataclasses.replace(GOOD, model=Model(context=1022), parallel=Parallel(tensor=4, sequence_parallel=True))
    with pytest.raises(UserError, match=r"model.context \(with parallel.sequence_parallel\) = 1,022 cannot be cut"):
        checked(run)


def test_a_launcher_with_another_number_of_ranks_gets_the_nearest_layouts_that_fit():
    run = dataclasses.replace(GOOD, parallel=Parallel(data=2, tensor=4))
    with pytest.raises(UserError, match="12 ranks fit 3 x 1 x 4") as caught:
        check_world(run, 12)
    assert "the launcher started 12 ranks, and parallel.data x pipeline x tensor = 2 x 1 x 4 = 8" in str(caught.value)
    check_world(run, 8)


def test_fewer_micro_batches_than_stages_are_legal_and_their_cost_is_named():
    few = dataclasses.replace(GOOD, train=Train(global_batch=16, micro_batch=8), parallel=Parallel(pipeline=4))
    assert checked(few) is few
    (cost,) = costs_of(few)
    assert cost.startswith("a step has 2 micro-batches for parallel.pipeline = 4 stages, which are then idle 60%")
    assert costs_of(GOOD) == []


def test_a_legal_run_comes_back_unchanged():
    assert checked(GOOD) is GOOD
