"""Faults planted in layouts: each must be caught, and called by its name."""

from __future__ import annotations

import pytest

from megagpt import config
from megagpt.errors import UserError
from megagpt.verify import faults
from megagpt.verify.layouts import parse
from megagpt.verify.task import run_of
from megagpt.verify.trial import try_layout


@pytest.mark.parametrize("name", faults.FAULTS)
def test_a_planted_fault_is_caught_and_named(name):
    fault = faults.named(name)
    run = faults.fitting(run_of(config.load("gpt3-125m"), parse(fault.layout)), name)
    result = try_layout(run, fault.layout, fault=name)
    assert result.kind == fault.kind, result.problem or "everything agreed"
    assert "first to differ" in result.problem


def test_an_unknown_fault_is_refused_with_the_ones_there_are():
    with pytest.raises(UserError, match="Did you mean stale-copy"):
        faults.named("stale-cop")
