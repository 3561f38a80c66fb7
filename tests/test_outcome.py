"""How attempts and ranks end, and how a run is asked to."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from megagpt import outcome, stop
from megagpt.errors import RunFailure, UserError
from megagpt.outcome import Cause, Outcome


def failed(cause: Cause, rank: int, time: float) -> Outcome:
    return Outcome(result="failed", cause=cause, rank=rank, host=f"n{rank}", time=time)


@pytest.mark.parametrize(
    ("error", "cause", "retry"),
    [
        (UserError("optim.lr = -1"), "user", "never"),
        (RunFailure("the run has diverged", cause="diverged"), "diverged", "never"),
        (RunFailure("differs", cause="corruption", rank=3), "corruption", "exclude_node"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full", "back_off"),
        (MemoryError(), "out_of_memory", "never"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "node", "exclude_node"),
        (RuntimeError("[gloo] Connection closed by peer [10.0.0.3]:1234"), "peer_lost", "back_off"),
        (ConnectionResetError(), "peer_lost", "back_off"),
        (ZeroDivisionError("division by zero"), "error", "back_off"),
    ],
)
def test_each_error_has_its_cause_and_what_may_help(error, cause, retry):
    found = outcome.of_error(error, rank=1)
    assert (found.cause, found.retry) == (cause, retry)
    assert found.rank == (3 if cause == "corruption" else 1)


def test_the_first_cause_counts_and_not_the_complaints_of_peers_or_a_death_without_a_word():
    peer, killed, error = failed("peer_lost", 0, 1.0), failed("rank_lost", 1, 2.0), failed("error", 2, 3.0)
    assert outcome.verdict([peer, killed, error]) == error
    assert outcome.verdict([peer, killed]) == killed
    assert outcome.verdict([peer]) == peer
    assert outcome.verdict([]) is None


def test_a_run_that_is_done_stays_done_whatever_a_rank_says_later():
    done = Outcome(result="finished", cause="done", rank=0, time=9.0)
    assert outcome.verdict([failed("error", 1, 1.0), done]) == done


def test_words_survive_disk_in_order_and_what_cannot_be_read_is_no_word(tmp_path: Path):
    later, earlier = failed("error", 0, 5.0), failed("hang", 1, 4.0)
    outcome.write_rank(tmp_path, later)
    outcome.write_rank(tmp_path, earlier)
    outcome.write_rank(tmp_path, failed("error", 1, 6.0))  # a rank speaks once
    (tmp_path / "rank-00002.json").write_text('{"result": "fai')
    (tmp_path / "rank-00003.json").write_text('{"result": "failed", "cause": "of another version"}')
    assert outcome.words(tmp_path) == [earlier, later]


def test_attempts_are_numbered_and_a_launcher_may_name_them(tmp_path: Path, monkeypatch):
    assert [outcome.begin(tmp_path).name for _ in range(2)] == ["0001", "0002"]
    monkeypatch.setenv(outcome.ATTEMPT, str(tmp_path / "attempts" / "0002"))
    assert outcome.attempt_folder(tmp_path).name == "0002"
    monkeypatch.delenv(outcome.ATTEMPT)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    assert outcome.attempt_folder(tmp_path).name == "torchrun-job-0003"


def test_a_run_is_asked_to_stop_by_a_file_with_or_without_a_cause(tmp_path: Path):
    assert stop.asked(tmp_path) is None
    assert stop.asked(tmp_path / "nowhere") is None
    stop.ask(tmp_path, "time_limit")
    assert stop.asked(tmp_path) == "time_limit"
    (tmp_path / stop.NAME).write_text("")
    assert stop.asked(tmp_path) == "asked"
    (tmp_path / stop.NAME).write_text("now, if you would")
    assert stop.asked(tmp_path) == "asked"
    stop.forget(tmp_path)
    assert stop.asked(tmp_path) is None


def test_the_stop_file_is_seen_by_a_running_rank_with_its_cause(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(stop, "LOOK_SECONDS", -1.0)
    with stop.StopSignal(tmp_path) as wish:
        assert wish.code() == 0
        stop.ask(tmp_path, "preempted")
        assert stop.CAUSES[wish.code() - 1] == "preempted"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_schedulers_signals_ask_politely_however_often_they_come(number):
    before = signal.getsignal(number)
    with stop.StopSignal() as wish:
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert wish.cause() == "asked"
    assert signal.getsignal(number) == before


def test_a_second_interrupt_ends_a_run_at_once():
    with stop.StopSignal() as wish:
        os.kill(os.getpid(), signal.SIGINT)
        assert wish.cause() == "asked"
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
