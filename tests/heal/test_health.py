"""The judgements on a step, on made-up losses."""

from __future__ import annotations

import random

import pytest

from megagpt.config import Heal
from megagpt.errors import RunFailure
from megagpt.heal.health import Health
from megagpt.parallel.engine import Step

HEAL = Heal(spike_score=6.0, spike_steps=3, spike_window=16, skip_budget=2)


def done(loss: float = 3.0, *, skipped: bool = False, scale: float = 1.0, after: float | None = None) -> Step:
    return Step(
        loss=loss,
        grad_norm=1.0,
        tokens=1,
        skipped=skipped,
        seen_by=1 if skipped else None,
        loss_scale=scale,
        next_loss_scale=scale if after is None else after,
    )


def trained(heal: Heal = HEAL, steps: int = 40) -> Health:
    """After `steps` steps whose loss falls, with some noise."""
    health, rng = Health(heal, {}, fp16=False), random.Random(0)
    for step in range(1, steps + 1):
        assert health.judge(done(4.0 - step / 100 + rng.gauss(0, 0.02)), step) == "well"
    return health


def test_a_loss_far_above_its_window_is_a_spike_only_after_some_steps_in_a_row():
    health = trained()
    assert [health.judge(done(9.0), step) for step in (41, 42, 43)] == ["well", "well", "spike"]
    assert health.spike_began() == 41
    health = trained()
    assert [health.judge(done(loss), step) for step, loss in enumerate((9.0, 9.0, 3.6, 9.0, 9.0), 41)] == ["well"] * 5


def test_a_falling_loss_is_no_spike_however_far_it_falls():
    health = trained()
    assert [health.judge(done(0.1), step) for step in range(41, 50)] == ["well"] * 9


def test_a_step_that_is_skipped_again_after_a_restart_counts_once():
    health = Health(HEAL, {"skips": [5]}, fp16=False)
    health.skipped_before([5, 7])
    assert health.state()["skips"] == [5, 7]
    for step in (7, 7):
        assert health.judge(done(skipped=True), step) == "skipped"
    assert health.state()["skips"] == [5, 7]
    with pytest.raises(RunFailure, match="is one of 3 such steps"):
        health.judge(done(skipped=True), 8)


def test_spikes_do_not_become_their_own_yardstick():
    health = trained()
    verdicts = [health.judge(done(9.0), step) for step in range(41, 80)]
    assert verdicts == ["well", "well", *["spike"] * 37]


def test_spikes_are_left_alone_unless_a_score_is_set_and_before_the_window_is_full():
    health = Health(Heal(), {}, fp16=False)
    assert {health.judge(done(3.0 if step < 200 else 99.0), step) for step in range(1, 220)} == {"well"}
    health = Health(HEAL, {}, fp16=False)
    assert {health.judge(done(3.0 if step < 16 else 99.0), step) for step in range(1, 17)} == {"well"}


def test_a_health_that_is_saved_and_restored_judges_as_one_that_was_not():
    losses = [3.0, 9.0, 9.0, 3.5, 9.0, 9.0, 9.0, 9.0]
    whole, cut = trained(), trained()
    for step, loss in enumerate(losses, 41):
        cut = Health(HEAL, cut.state(), fp16=False)
        assert cut.judge(done(loss), step) == whole.judge(done(loss), step)
    assert cut.state() == whole.state()


def test_skipped_steps_have_a_budget_among_any_hundred():
    health = Health(HEAL, {}, fp16=False)
    for step in (1, 2, 101, 102):  # never three within a hundred
        assert health.judge(done(float("nan"), skipped=True), step) == "skipped"
    with pytest.raises(RunFailure, match=r"step 103 .* one of 3 such steps .* heal.skip_budget = 2") as caught:
        health.judge(done(float("nan"), skipped=True), 103)
    assert (caught.value.cause, caught.value.rank) == ("diverged", 1)


def test_fp16_overflows_have_no_budget_until_the_scale_has_collapsed():
    health = Health(HEAL, {}, fp16=True)
    for power in range(16, 1, -1):
        assert health.judge(done(skipped=True, scale=2.0**power, after=2.0 ** (power - 1)), 17 - power) == "skipped"
    with pytest.raises(RunFailure, match="the scale has collapsed"):
        health.judge(done(skipped=True, scale=2.0, after=1.0), 20)
