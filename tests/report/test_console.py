"""The lines of a run on a file and on a terminal."""

import io
import math

import pytest

from megagpt.report.console import Console, plan_lines, speed, step_line
from megagpt.report.metrics import EvaluationRecord, StepRecord


class Terminal(io.StringIO):
    def isatty(self):
        return True


def a_step(step, **changes):
    values = {
        "loss": 3.25, "grad_norm": 0.5, "lr": 6e-4, "tokens": step * 1000, "tokens_per_s": 500.0, "mfu": 0.4,
        "hfu": 0.4, "batch": 2, "seconds": 2.0, "data_wait_seconds": 0.02, "memory_gib": 1.5,
    }  # fmt: skip
    return StepRecord(step=step, **(values | changes))


def run_of(stream, steps=25, **changes):
    with Console(steps=steps, total_tokens=steps * 1000, every=10, stream=stream) as console:
        for step in range(1, steps + 1):
            console.step(a_step(step, **changes))
    return stream.getvalue()


def test_a_file_gets_the_first_every_tenth_and_the_last_step_and_no_control_codes():
    lines = run_of(io.StringIO()).splitlines()
    assert [line.split("/")[0].split()[-1] for line in lines] == ["1", "10", "20", "25"]
    assert not any(code in line for line in lines for code in "\x1b\r")


def test_a_line_tells_loss_norm_rate_speed_mfu_memory_wait_and_time_left():
    line = run_of(io.StringIO()).splitlines()[1]
    expected = "step 10/25 loss 3.2500 norm 0.50 lr 6.00e-04 500 tok/s MFU 40.0% mem 1.5 GiB wait 1.0% left 30 s"
    assert " ".join(line.split()) == expected


def test_a_terminal_gets_colour_and_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = run_of(Terminal())
    assert "\x1b[1m 3.2500" in text
    assert "━" in text


def test_no_color_is_obeyed(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[32m" not in run_of(Terminal())


def test_a_long_line_is_never_broken(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert all(line.startswith("step") for line in run_of(io.StringIO()).splitlines())


def test_speed_and_mfu_are_over_all_steps_since_the_line_before():
    records = [
        a_step(1, tokens_per_s=1000.0, seconds=1.0, mfu=0.5, data_wait_seconds=0.0),
        a_step(2, tokens_per_s=200.0, seconds=3.0, mfu=0.1, data_wait_seconds=1.0),
    ]
    assert speed(records) == 400
    assert "MFU 20.0%  mem 1.5 GiB  wait 25.0%" in step_line(records, steps=9, seconds_left=1.0).plain


def test_an_unknown_peak_is_a_question_mark_and_a_lost_loss_is_shown():
    line = step_line([a_step(1, mfu=None, hfu=None, loss=math.nan)], steps=9, seconds_left=math.inf).plain
    assert "MFU ?" in line
    assert "nan" in line
    assert line.endswith("left unknown")


def test_skipped_steps_are_counted_with_the_loss_scale():
    records = [a_step(1, skipped=True, loss_scale=65_536.0), a_step(2, loss_scale=32_768.0)]
    assert step_line(records, steps=9, seconds_left=1.0).plain.endswith("1 skipped, loss scale 32,768")


def test_a_line_is_about_the_steps_since_the_line_before_alone():
    stream = io.StringIO()
    with Console(steps=30, total_tokens=30_000, every=10, stream=stream) as console:
        for step in range(1, 31):
            console.step(a_step(step, skipped=step == 12, loss_scale=1.0))
    assert ["skipped" in line for line in stream.getvalue().splitlines()] == [False, False, True, False]


def test_a_plan_is_aligned_and_at_most_fifteen_lines():
    assert plan_lines([("model", "a"), ("data order", "b")]) == ["  model       a", "  data order  b"]
    with pytest.raises(ValueError, match="15"):
        plan_lines([("a", "b")] * 16)


def test_text_of_the_user_is_printed_as_it_is():
    stream = io.StringIO()
    with Console(steps=1, total_tokens=1, every=1, stream=stream) as console:
        console.plan("run [bold]x", [("out", "runs/[red]a")])
        console.note("[/]")
        console.warn("[b]")
        figures = {"loss": 1.0, "perplexity": 2.72, "bits_per_byte": 0.5, "sequences": 8}
        console.evaluation(EvaluationRecord(step=1, tokens=9, corpus="[i]code", **figures))
    assert stream.getvalue() == (
        "run [bold]x\n  out  runs/[red]a\n[/]\nwarning: [b]\n"
        "held out, [i]code:  loss 1.0000  perplexity 2.72  0.5000 bits per byte\n"
    )
