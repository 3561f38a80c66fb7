"""The wall time of made-up attempts, and what Young and Daly expect."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path

import pytest

from benchmarks.goodput import Machine, simulate
from megagpt.checkpoint.interval import best_interval
from megagpt.heal.attempts import Beat, write_beat
from megagpt.heal.goodput import expected_share, goodput, young
from megagpt.report.goodput import goodput_lines, goodput_section
from tests.heal.beats import BEAT


def attempts(out: Path, *beats: Beat) -> Path:
    for number, beat in enumerate(beats, 1):
        folder = out / "attempts" / f"{number:04d}"
        folder.mkdir(parents=True)
        write_beat(folder, beat)
    return out


def test_attempts_and_the_time_between_them_add_up_to_the_wall_time(tmp_path):
    second = dataclasses.replace(
        BEAT, began=1130.0, beat=1240.0, since=1200.0, ended="hang", repeats_first=True,
        seconds={"start": 12.0, "compile": 6.5, "repeated": 30.0, "step": 61.5},
    )  # fmt: skip
    split = goodput(attempts(tmp_path, BEAT, second), mtbf_hours=0)
    assert split is not None
    assert split.wall == 240
    assert split.seconds == pytest.approx(
        {
            "steps": 70.5 + 1.5 + 61.5 - 40,
            "repeated": 31.5,
            "data": 1.0,
            "save": 8.0,
            "evaluation": 4.0,
            "start": 22.0,
            "compile": 10.0,
            "hang": 40.0,
            "lost": 30.0,
        }
    )
    assert sum(split.seconds.values()) == pytest.approx(split.wall)
    assert split.predicted is not None
    assert split.predicted.failures == 1
    assert split.predicted.restart == pytest.approx(-240 * math.log(1 - (30 + 40 + 12 + 10) / 240))
    assert "goodput 39.0% of 4 min 00 s in 2 attempts: steps 39.0%, repeated 13.1%" in goodput_lines(split)[0]
    assert "lost" in goodput_section(split)


def test_a_run_that_left_no_trace_has_no_goodput(tmp_path):
    assert goodput(tmp_path, mtbf_hours=0) is None


def simulated(*, interval: float, save: float, restart: float, mtbf: float) -> float:
    """The share of time in steps that count, of a machine that fails at random, whatever it does."""
    rng, wall, kept, fails = random.Random(1), 0.0, 0.0, 0.0
    fails = rng.expovariate(1 / mtbf)
    while kept < 30_000 * interval:
        if wall + interval + save <= fails:
            wall, kept = wall + interval + save, kept + interval
            continue
        wall = fails
        fails = wall + rng.expovariate(1 / mtbf)
        while wall + restart > fails:
            wall = fails
            fails = wall + rng.expovariate(1 / mtbf)
        wall += restart
    return kept / wall


@pytest.mark.parametrize(("interval", "save", "restart", "mtbf"), [(60, 2, 30, 1000), (300, 20, 200, 900)])
def test_the_expected_share_is_that_of_a_simulated_machine(interval, save, restart, mtbf):
    expected = expected_share(interval=interval, save=save, restart=restart, mtbf=mtbf)
    assert simulated(interval=interval, save=save, restart=restart, mtbf=mtbf) == pytest.approx(expected, rel=0.02)


def test_what_a_run_of_many_failures_measures_is_what_is_expected_of_its_own_numbers(tmp_path):
    machine = Machine(step=2.0, every=10, save=2.0, notice=4.0, start=20.0, compile=4.0, mtbf=120.0)
    simulate(tmp_path, machine, failures=500)
    split = goodput(tmp_path, mtbf_hours=0)
    assert split is not None
    assert split.predicted is not None
    assert split.predicted.failures == 500
    assert 0.5 < split.comparable < 0.8
    assert split.comparable == pytest.approx(split.predicted.share, rel=0.02)


def test_dalys_interval_is_the_best_one_and_youngs_is_near_it():
    def wasted(interval: float) -> float:
        return -expected_share(interval=interval, save=20, restart=60, mtbf=3600)

    best = min(range(10, 2000), key=wasted)
    assert best_interval(save_seconds=20, mtbf_seconds=3600) == pytest.approx(best, rel=0.01)
    assert young(20, 3600) == pytest.approx(best, rel=0.06)
