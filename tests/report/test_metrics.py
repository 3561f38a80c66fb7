"""Record files: each step once, whatever killed the run before."""

import json
import math
import signal
import subprocess
import sys

import pytest

from megagpt.errors import UserError
from megagpt.report.metrics import (
    EvaluationRecord,
    StepRecord,
    open_evaluations,
    open_events,
    open_metrics,
    read_records,
    record_event,
)


def a_step(step, **changes):
    values = {
        "loss": 1.0 / 3 + step, "grad_norm": 0.1, "lr": 6e-4, "tokens": step * 512, "tokens_per_s": 1234.5,
        "mfu": 0.41, "hfu": 0.5, "batch": 2, "seconds": 0.4, "data_wait_seconds": 0.001, "memory_gib": 1.5,
    }  # fmt: skip
    return StepRecord(step=step, **(values | changes))


def write_steps(out, resume_step, steps):
    with open_metrics(out, resume_step) as metrics:
        for step in steps:
            metrics.append(a_step(step))


def steps_in(out):
    return [record["step"] for record in read_records(out / "metrics.jsonl")]


def test_a_resumed_run_has_each_step_once(tmp_path):
    write_steps(tmp_path, 0, range(1, 8))
    write_steps(tmp_path, 4, range(5, 10))
    assert steps_in(tmp_path) == list(range(1, 10))


def test_a_run_that_starts_again_from_nothing_keeps_no_step(tmp_path):
    write_steps(tmp_path, 0, range(1, 4))
    write_steps(tmp_path, 0, range(1, 3))
    assert steps_in(tmp_path) == [1, 2]


def test_a_loss_is_read_back_bit_for_bit(tmp_path):
    write_steps(tmp_path, 0, [1, 2])
    write_steps(tmp_path, 1, [])
    assert read_records(tmp_path / "metrics.jsonl")[0]["loss"] == 1.0 / 3 + 1


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3', b"\0\0\0\0", b"\xff", b'"loss'])
def test_a_torn_last_line_is_healed(tmp_path, torn):
    write_steps(tmp_path, 0, [1, 2])
    with (tmp_path / "metrics.jsonl").open("ab") as stream:
        stream.write(torn)
    assert steps_in(tmp_path) == [1, 2]
    write_steps(tmp_path, 2, [3])
    assert steps_in(tmp_path) == [1, 2, 3]
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_a_whole_last_line_that_only_lacks_its_end_is_kept(tmp_path):
    write_steps(tmp_path, 0, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    write_steps(tmp_path, 2, [3])
    assert steps_in(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("broken", ["{", "[1]", "7", '{"loss": 1}', '{"step": "2"}', '{"step": true}'])
def test_a_broken_line_inside_is_named(tmp_path, broken):
    write_steps(tmp_path, 0, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], broken, lines[2]]) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: "):
        open_metrics(tmp_path, 3)


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with open_metrics(tmp_path, 0) as metrics:
        metrics.append(a_step(1, loss=math.nan, grad_norm=math.inf))
    record = read_records(tmp_path / "metrics.jsonl")[0]
    assert record["loss"] is None
    assert record["grad_norm"] is None
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_steps_survive_sigkill_in_the_line_that_wrote_them(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path; from megagpt.report.metrics import open_metrics\n"
        "metrics = open_metrics(Path(sys.argv[1]), 0)\n"
        "[metrics.append({'step': step}) for step in range(1, 101)]\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert steps_in(tmp_path) == list(range(1, 101))


def test_an_evaluation_at_the_resumed_step_is_kept_and_later_ones_are_not(tmp_path):
    record = {"tokens": 1, "corpus": "prose", "loss": 1.0, "perplexity": 2.7, "bits_per_byte": 1.0, "sequences": 4}
    with open_evaluations(tmp_path, 0) as evaluations:
        for step in (10, 20, 30):
            evaluations.append(EvaluationRecord(step=step, **record))
    open_evaluations(tmp_path, 20).close()
    assert [record["step"] for record in read_records(tmp_path / "evaluations.jsonl")] == [10, 20]


def test_events_are_never_dropped_and_have_a_time(tmp_path):
    for number in range(2):
        with open_events(tmp_path) as events:
            record_event(events, "started", attempt=number)
        with (tmp_path / "events.jsonl").open("ab") as stream:
            stream.write(b'{"time": "20')
    records = read_records(tmp_path / "events.jsonl")
    assert [record["attempt"] for record in records] == [0, 1]
    assert all(record["time"].endswith("+00:00") and record["event"] == "started" for record in records)


def test_a_file_that_does_not_exist_holds_no_records(tmp_path):
    assert read_records(tmp_path / "metrics.jsonl") == []
