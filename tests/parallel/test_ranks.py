from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megagpt.errors import UserError
from megagpt.parallel import launcher, ranks
from tests.ranks import on_ranks


def test_ranks_know_their_place_and_meet(tmp_path):
    def work() -> list[float]:
        ranks.join(world=2)
        return [ranks.rank(), ranks.world_size(), *ranks.sum_over_ranks([1.0, ranks.rank()])]

    assert on_ranks(work, 2, tmp_path) == [[0, 2, 2.0, 1.0], [1, 2, 2.0, 1.0]]


def test_the_parent_is_untouched_by_its_ranks():
    assert ranks.run_local(lambda: None, 1) == 0
    assert not launcher.launched()


def test_a_users_error_is_printed_once_and_last(capfd):
    def work() -> None:
        raise UserError("optim.lr = -1 must be above 0.", "Raise it.")

    assert ranks.run_local(work, 2) == 2
    assert capfd.readouterr().err == "megagpt: optim.lr = -1 must be above 0.\n  Raise it.\n"


def test_a_rank_that_dies_takes_the_others_with_it_and_its_cause_is_the_last_line(capfd, monkeypatch):
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.2)

    def work() -> None:
        if ranks.rank() == 1:
            raise RuntimeError("the cause")
        time.sleep(600)

    began = time.monotonic()
    assert ranks.run_local(work, 2) == 1
    assert time.monotonic() - began < 300  # not a speed: rank 0 did not sleep to its end
    assert capfd.readouterr().err.splitlines()[-1] == "megagpt: rank 1 died: RuntimeError: the cause"


def test_a_launcher_with_another_number_of_ranks_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="the layout has 2 ranks .*; the launcher started 3"):
        ranks.join(world=2)


def test_no_rank_outlives_a_killed_parent(tmp_path: Path):
    code = f"""
import os, time
from pathlib import Path
from megagpt.parallel import ranks
def work():
    Path({str(tmp_path)!r}, str(ranks.rank())).write_text(str(os.getpid()))
    time.sleep(600)
ranks.run_local(work, 2)
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    files = [tmp_path / "0", tmp_path / "1"]
    while not all(path.exists() and path.read_text() for path in files):
        time.sleep(0.05)
        assert parent.poll() is None
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for path in files:
        while _alive(int(path.read_text())):
            time.sleep(0.05)  # the test hangs if the rank does


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
        return "Z" not in Path(f"/proc/{process}/stat").read_text().split(")")[1]
    except (ProcessLookupError, FileNotFoundError):
        return False
