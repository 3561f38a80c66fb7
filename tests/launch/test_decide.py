"""What follows an attempt, by how it ended and what was tried before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megagpt import outcome
from megagpt.launch import faults
from megagpt.launch.decide import Attempt, decide
from megagpt.launch.spec import Retries
from megagpt.outcome import Cause

RETRIES = Retries(inside=3, requeues=2, without_progress=3, back_off_seconds=5.0)


def attempt(cause: Cause, *, job: str = "1.0", progress: bool = True) -> Attempt:
    result: Any = {"done": "finished", "asked": "stopped", "preempted": "stopped", "time_limit": "stopped"}
    ended = outcome.ended(result.get(cause, "failed"), cause, rank=0, host="n1")
    return Attempt(job=job, progress=progress, outcome=ended)


@pytest.mark.parametrize("cause", ["done", "asked", "user", "diverged", "out_of_memory"])
def test_what_another_attempt_cannot_mend_ends_at_once(cause):
    assert decide([attempt(cause)], RETRIES, enough_nodes=True).action == "end"


@pytest.mark.parametrize("cause", ["preempted", "time_limit"])
def test_a_run_that_the_scheduler_stopped_comes_again(cause):
    assert decide([attempt(cause)], RETRIES, enough_nodes=True).action == "leave"


@pytest.mark.parametrize("cause", ["rank_lost", "hang", "node", "error", "disk_full", "corruption"])
def test_a_fault_restarts_at_once_while_the_run_gets_on(cause):
    decision = decide([attempt(cause)], RETRIES, enough_nodes=True)
    assert (decision.action, decision.pause_seconds) == ("restart", 0.0)


def test_attempts_that_achieve_nothing_wait_longer_and_longer_and_then_end():
    barren = [attempt("error", progress=False)] * 3
    assert decide(barren[:1], RETRIES, enough_nodes=True).pause_seconds == 5.0
    assert decide(barren[:2], RETRIES, enough_nodes=True).pause_seconds == 10.0
    assert decide(barren, RETRIES, enough_nodes=True).action == "end"
    between = [*barren[:1], attempt("error"), barren[0]]
    assert decide(between, RETRIES, enough_nodes=True).pause_seconds == 5.0


def test_without_enough_good_nodes_the_job_leaves():
    assert decide([attempt("node")], RETRIES, enough_nodes=False).action == "leave"


def test_restarts_inside_a_job_and_requeues_have_their_budgets():
    here = [attempt("rank_lost")] * 4
    assert decide(here[:3], RETRIES, enough_nodes=True).action == "restart"
    assert decide(here, RETRIES, enough_nodes=True).action == "leave"
    requeued = [attempt("preempted", job=f"1.{count}") for count in range(3)]
    assert decide(requeued[:2], RETRIES, enough_nodes=True).action == "leave"
    assert decide(requeued, RETRIES, enough_nodes=True).action == "end"


def test_a_node_is_out_after_one_fault_of_its_own_or_two_that_may_be(tmp_path: Path, monkeypatch):
    def fault(cause: Cause, host: str) -> None:
        faults.remember(tmp_path, outcome.ended("failed", cause, "why", rank=1, host=host), job="1")

    fault("node", "n1")
    fault("rank_lost", "n2")
    fault("user", "n3")
    assert list(faults.excluded(tmp_path)) == ["n1"]
    fault("hang", "n2")
    assert faults.excluded(tmp_path) == {"n1": "node: why", "n2": "rank lost: why; hang: why"}
    monkeypatch.setattr(faults, "MEMORY_SECONDS", 0.0)
    assert faults.excluded(tmp_path) == {}
