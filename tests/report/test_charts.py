"""The drawings: what they show, and that nothing in them is taken for markup."""

import json
import math
import re

import pytest

from megagpt.report.charts import MOST_POINTS, Series, bar_chart, line_chart, smoothed, thinned


def data_of(figure):
    return json.loads(re.findall(r'<script type="application/json">(.*?)</script>', figure)[0])


def test_a_spike_survives_thinning():
    points = [(step, 1.0) for step in range(100_000)]
    points[54_321] = (54_321, 99.0)
    points[77_777] = (77_777, -5.0)
    kept = thinned(Series(name="a", points=points)).points
    assert len(kept) <= MOST_POINTS + 2
    assert {points[54_321], points[77_777], points[-1]} <= set(kept)
    assert list(kept) == sorted(kept)


def test_a_run_that_diverged_keeps_its_gap():
    points = [(step, 1.0 if step < 5000 else math.nan) for step in range(10_000)]
    kept = thinned(Series(name="a", points=points)).points
    assert math.isnan(kept[-1][1])


def test_a_short_series_is_drawn_whole():
    series = Series(name="a", points=[(step, float(step % 7)) for step in range(MOST_POINTS)])
    assert thinned(series) == series


def test_smoothing_keeps_a_straight_line_and_halves_noise():
    line = smoothed([(step, 2.0 * step) for step in range(800)])
    assert all(y == pytest.approx(2.0 * x) for x, y in line[:780])
    noise = [(step, float(step % 2)) for step in range(800)]
    assert all(abs(y - 0.5) < 0.1 for _, y in smoothed(noise)[100:])


def test_smoothing_leaves_lost_values_out():
    points = [(step, math.nan if step == 400 else 1.0) for step in range(800)]
    result = smoothed(points)
    assert math.isnan(result[400][1])
    assert result[399][1] == result[401][1] == 1.0


def test_a_lost_value_is_a_gap_in_the_line():
    points = [(1, 1.0), (2, 2.0), (3, math.nan), (4, 2.0), (5, 1.0)]
    figure = line_chart("loss", [Series(name="a", points=points)], width=400, height=200)
    assert figure.count("<polyline") == 2
    assert "nan" not in figure


def test_the_pointer_finds_every_series_at_its_step():
    loss = Series(name="loss", points=[(1, 4.0), (2, 3.0)], digits=".2f")
    heldout = Series(name="held out", points=[(2, 3.5)], colour=2, kind="dots", digits=".2f", unit=" nats")
    rows = data_of(line_chart("x", [loss, heldout], width=400, height=200))["rows"]
    assert [row[1] for row in rows] == ["step 1", "step 2"]
    assert rows[1][2] == [["loss", "3.00", "1"], ["held out", "3.50 nats", "2"]]


def test_names_are_never_markup():
    evil = "</script><script>alert(1)</script>&"
    figure = line_chart(evil, [Series(name=evil, points=[(1, 1.0)])] * 2, width=400, height=200)
    assert "<script>alert" not in figure
    assert "</script><script>" not in bar_chart(evil, [(evil, 1.0, True)], note=evil)
    assert data_of(figure)["rows"][0][2][0][0] == evil


@pytest.mark.parametrize("points", [[], [(1, math.nan)]])
def test_a_chart_without_values_says_so(points):
    assert "no values" in line_chart("loss", [Series(name="a", points=points)], width=400, height=200)


def test_a_logarithmic_chart_leaves_zeros_out():
    figure = line_chart(
        "norm", [Series(name="a", points=[(1, 0.0), (2, 1.0), (3, 9.0)])], width=400, height=200, log=True
    )
    assert figure.count("<polyline") == 1
    assert [len(points.split()) for points in re.findall(r'points="([^"]*)"', figure)] == [2]


def test_bars_are_as_long_as_their_values():
    figure = bar_chart("bits", [("xz", 2.0, False), ("model", 1.0, True)], note="lower is better")
    assert re.findall(r"width:([\d.]+)%", figure) == ["100.00", "50.00"]
    assert figure.count('class="bar own"') == 1
