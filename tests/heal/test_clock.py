"""The clock of a rank: phases that add up."""

from __future__ import annotations

import time

import pytest

from megagpt.heal.clock import Clock


def test_phases_add_up_to_the_wall_clock():
    began = time.time()
    clock = Clock(began)
    for step in range(1, 4):
        clock.enter("data", step)
        clock.enter(clock.computing(step), step)
        time.sleep(0.01)
    assert sum(clock.seconds().values()) == pytest.approx(time.time() - began, abs=0.005)
    assert clock.seconds()["step"] >= 0.02
    assert set(clock.seconds()) == {"start", "data", "compile", "step"}


def test_a_step_that_was_done_before_is_a_repeated_one():
    clock = Clock(time.time())
    clock.reached = 7
    phases = []
    for step in (5, 6, 7, 8, 7, 9):
        phases.append(clock.computing(step))
        clock.enter(phases[-1], step)
    assert phases == ["compile", "repeated", "repeated", "step", "repeated", "step"]
