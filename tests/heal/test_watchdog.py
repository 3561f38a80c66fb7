"""Whom the watchdog waits for before it names the rank that is behind."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest

from megagpt.config import Heal
from megagpt.heal.attempts import write_beat
from megagpt.heal.clock import Clock
from megagpt.heal.watchdog import Watchdog, behind
from tests.heal.beats import BEAT

HANGING = dataclasses.replace(BEAT, since=1090.0, waiting=True, hanging=True, ended="hang")


class Waited(Exception):
    """The watchdog wanted to wait."""


@pytest.fixture
def watchdog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watchdog:
    def refuse(_: float) -> None:
        raise Waited

    monkeypatch.setattr(time, "sleep", refuse)

    def tell(*_: Any) -> None:
        pass

    return Watchdog(Heal(), Clock(time.time()), tmp_path, rank=0, world=2, tell=tell)


def test_a_rank_that_has_not_beaten_for_long_is_not_waited_for_and_is_the_one_behind(watchdog, tmp_path):
    write_beat(tmp_path, HANGING)
    write_beat(tmp_path, dataclasses.replace(HANGING, rank=1, beat=1091.0, hanging=False, waiting=False))
    beats = watchdog._beats_of_all(stale=1098.0)
    assert behind(beats, stale=1098.0).rank == 1


def test_a_rank_that_beats_and_has_not_found_its_hang_yet_is_waited_for(watchdog, tmp_path):
    write_beat(tmp_path, HANGING)
    with pytest.raises(Waited):
        watchdog._beats_of_all(stale=1098.0)
    write_beat(tmp_path, dataclasses.replace(HANGING, rank=1, beat=1099.5, hanging=False))
    with pytest.raises(Waited):
        watchdog._beats_of_all(stale=1098.0)
