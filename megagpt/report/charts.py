"""Charts as inline SVG: no library, no request. Colours are the page's variables, so both of its themes fit.

A line chart carries its points as JSON for the page's script, which shows the values under the pointer; without
scripts the drawing stands as it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Literal

from megagpt.report.axis import Axis, linear_axis, log_axis

LEFT, RIGHT, TOP, BOTTOM = 48, 20, 10, 30
MOST_POINTS = 400


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line, or row of dots. `points` are (x, y) in rising x; a y that is not a finite number leaves a gap."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 1
    """The page's variables --series-1 to --series-4."""
    kind: Literal["line", "faint", "dots"] = "line"
    unit: str = ""
    """Written behind the values under the pointer."""
    digits: str = ".4g"
    """Their format."""


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    width: int,
    height: int,
    zero: bool = False,
    log: bool = False,
) -> str:
    """A figure of `series` over the steps. `zero` lets the values' axis begin at 0, `log` makes it logarithmic."""
    series = [thinned(one) for one in series]
    finite = [(x, y) for one in series for x, y in one.points if math.isfinite(y) and (y > 0 or not log)]
    if not finite:
        return f'<figure class="chart"><figcaption>{escape(title)}</figcaption><p class="none">no values</p></figure>'
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    x_axis = linear_axis(xs, start=LEFT, end=width - RIGHT, ticks=max(3, width // 110), tight=True)
    y_axis = (
        log_axis(ys, start=height - BOTTOM, end=TOP)
        if log
        else linear_axis(ys, start=height - BOTTOM, end=TOP, ticks=max(3, height // 60), zero=zero)
    )
    drawing = _grid(x_axis, y_axis, width=width, height=height) + "".join(_mark(one, x_axis, y_axis) for one in series)
    cross = f'<line class="cross" y1="{TOP}" y2="{height - BOTTOM}" visibility="hidden"/>'
    return (
        f'<figure class="chart" data-chart><figcaption>{escape(title)}{_legend(series)}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{drawing}{cross}</svg>'
        f'<div class="tip" hidden></div>'
        f'<script type="application/json">{_data(series, x_axis, width)}</script></figure>'
    )


def bar_chart(title: str, bars: Sequence[tuple[str, float, bool]], *, note: str) -> str:
    """Horizontal bars of (name, value, emphasised) from 0 on, each with its value; `note` says how to read them."""
    largest = max(value for _, value, _ in bars)
    rows = "".join(
        f'<div class="bar{" own" if own else ""}"><span class="name">{escape(name)}</span>'
        f'<span class="track"><span class="fill" style="width:{100 * value / largest:.2f}%"></span></span>'
        f'<span class="value">{value:.3f}</span></div>'
        for name, value, own in bars
    )
    reading = f'<p class="note">{escape(note)}</p>'
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{rows}{reading}</figure>'


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean over each point's neighbours: a fortieth of all of them, fewer near the start, where curves are steep.

    A y that is not a finite number is left out of the means, and stays a gap.
    """
    sums, counts = [0.0], [0]
    for _, y in points:
        finite = math.isfinite(y)
        sums.append(sums[-1] + (y if finite else 0.0))
        counts.append(counts[-1] + finite)
    result: list[tuple[float, float]] = []
    for i, (x, y) in enumerate(points):
        reach = min(i // 8, len(points) // 80)
        low, high = i - reach, min(i + reach + 1, len(points))
        result.append((x, (sums[high] - sums[low]) / (counts[high] - counts[low]) if math.isfinite(y) else y))
    return result


def thinned(series: Series) -> Series:
    """At most about 400 points: of each run of neighbours the lowest and the highest stay, so that spikes do."""
    points = series.points
    if len(points) <= MOST_POINTS:
        return series
    size = -(-2 * len(points) // MOST_POINTS)
    kept: list[tuple[float, float]] = []
    for begin in range(0, len(points), size):
        chunk = points[begin : begin + size]
        finite = [point for point in chunk if math.isfinite(point[1])] or [chunk[0]]
        ends = {min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])}
        kept += sorted(ends | ({points[-1]} if begin + size >= len(points) else set()))
    return Series(**{**vars(series), "points": kept})


def _grid(x_axis: Axis, y_axis: Axis, *, width: int, height: int) -> str:
    levels = [(y_axis.at(value), label) for value, label in y_axis.ticks]
    lines = [
        f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>'
        for y, label in levels
    ]
    lines += [
        f'<text class="tick" x="{x_axis.at(value):.1f}" y="{height - BOTTOM + 17}" text-anchor="middle">{label}</text>'
        for value, label in x_axis.ticks
    ]
    axis = f'<text class="tick" x="{LEFT}" y="{height - BOTTOM + 17}" text-anchor="middle">step</text>'
    return "".join(lines) + (axis if x_axis.at(x_axis.ticks[0][0]) > LEFT + 45 else "")


def _mark(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    def drawable(point: tuple[float, float]) -> bool:
        return math.isfinite(point[1]) and (point[1] > 0 or not y_axis.log)

    pieces = [
        [f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in piece]
        for shown, piece in groupby(series.points, key=drawable)
        if shown
    ]
    style = f'style="--colour:var(--series-{series.colour})"'
    if series.kind == "dots":
        pairs = [pixel.split(",") for piece in pieces for pixel in piece]
        dots = "".join(f'<circle class="dot" cx="{x}" cy="{y}" r="3.5"/>' for x, y in pairs)
        line = "".join(f'<polyline class="dashes" points="{" ".join(piece)}"/>' for piece in pieces)
        return f"<g {style}>{line}{dots}</g>"
    lines = "".join(f'<polyline class="{series.kind}" points="{" ".join(piece)}"/>' for piece in pieces)
    return f"<g {style}>{lines}</g>"


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    return "".join(
        f'<span class="key {one.kind}" style="--colour:var(--series-{one.colour})">{escape(one.name)}</span>'
        for one in series
    )


def _data(series: Sequence[Series], x_axis: Axis, width: int) -> str:
    """For the page's script: the drawing's width; for every x its pixel, its label and what each series has there."""
    values: dict[float, list[list[str]]] = {}
    for one in series:
        for x, y in one.points:
            text = f"{y:{one.digits}}{one.unit}" if math.isfinite(y) else "not a number"
            values.setdefault(x, []).append([one.name, text, str(one.colour)])
    rows = [[round(x_axis.at(x), 1), f"step {x:,.0f}", found] for x, found in sorted(values.items())]
    return json.dumps({"width": width, "rows": rows}, separators=(",", ":")).replace("<", "\\u003c")
