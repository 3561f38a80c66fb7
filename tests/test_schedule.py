from __future__ import annotations

import pytest

from megagpt import config
from megagpt.config import Optim
from megagpt.schedule import learning_rate

TOTAL = 1000


def rate(optim: Optim, tokens: int) -> float:
    return learning_rate(optim, tokens=tokens, total_tokens=TOTAL)


def test_the_warm_up_is_a_straight_line_to_the_peak():
    optim = Optim(lr=1.0, warmup_tokens=100)
    assert [rate(optim, tokens) for tokens in (1, 50, 100)] == [0.01, 0.5, 1.0]


def test_cosine_is_half_way_between_peak_and_floor_at_half_time_and_then_stays_on_the_floor():
    optim = Optim(lr=2.0, warmup_tokens=200, decay_tokens=800, lr_floor=0.1)
    assert rate(optim, 500) == pytest.approx(1.1)
    assert rate(optim, 800) == rate(optim, 1000) == pytest.approx(0.2)


def test_wsd_is_flat_and_then_falls_in_a_straight_line():
    optim = Optim(lr=1.0, schedule="wsd", warmup_tokens=100, wsd_decay=0.2, lr_floor=0.0)
    assert [rate(optim, tokens) for tokens in (100, 800)] == [1.0, 1.0]
    assert [rate(optim, tokens) for tokens in (850, 900, 1000)] == pytest.approx([0.75, 0.5, 0.0])


def test_constant_never_falls():
    assert rate(Optim(lr=1.0, schedule="constant"), 10 * TOTAL) == 1.0


def test_gpt3s_schedule_is_the_published_one():
    run = config.load("gpt3-175b")
    rates = [
        learning_rate(run.optim, tokens=tokens, total_tokens=run.train.tokens)
        for tokens in (375_000_000, 260_000_000_000, 300_000_000_000)
    ]
    assert rates == pytest.approx([0.6e-4, 0.6e-5, 0.6e-5])
