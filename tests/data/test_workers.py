from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from megagpt.data import progress
from megagpt.data.workers import Report, available_cores, run_tasks


class Fatal:
    """A task that kills the worker that unpickles it."""

    def __reduce__(self) -> tuple:
        return signal.raise_signal, (signal.SIGKILL,)


def apply(task: Any, report: Report) -> None:
    report(task)


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_every_task_is_done_once_and_reports(processes: int) -> None:
    found: list[int] = []
    run_tasks(range(1, 9), apply, processes=processes, report=found.append)
    assert sorted(found) == list(range(1, 9))


def test_a_worker_that_is_killed_is_an_error_and_not_a_wait() -> None:
    with pytest.raises(RuntimeError, match=r"a worker process died by signal 9 \(9: perhaps out of memory\)"):
        run_tasks([Fatal(), Fatal()], apply, processes=2, report=print)


def apply_number(task: Any, report: Report) -> None:
    report(task + 1)


def test_an_unforeseen_error_in_a_worker_carries_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"in a worker process:\n(.|\n)*TypeError"):
        run_tasks(["not a number"] * 2, apply_number, processes=2, report=print)


def test_no_worker_outlives_the_call() -> None:
    pids: list[int] = []
    run_tasks([0, 0, 0, 0], report_pid, processes=2, report=pids.append)
    for pid in set(pids):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def report_pid(_task: int, report: Report) -> None:
    report(os.getpid())


def interrupt_itself(task: int, report: Report) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    report(task)


def test_ctrl_c_is_for_the_parent_to_answer() -> None:
    found: list[int] = []
    run_tasks([1, 2, 3], interrupt_itself, processes=2, report=found.append)
    assert sorted(found) == [1, 2, 3]


def test_this_process_has_a_core() -> None:
    assert available_cores() >= 1


def test_without_a_terminal_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress.progress("building", 1000) as report:
        for second in range(1, 31):
            now[0] = float(second * 10)
            report(10)
            report(0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "building: 1%, about 16 min left"
    assert lines[-1] == "building: 30%, about 12 min left"
    assert len(lines) == 30
    assert [progress._duration(seconds) for seconds in (5.4, 89, 91, 9000)] == ["5 s", "89 s", "2 min", "2.5 h"]
