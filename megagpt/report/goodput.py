"""Where a run's wall time went, told: a few lines at its end, and a bar on its page."""

from __future__ import annotations

from html import escape

from megagpt.heal.goodput import KINDS, Goodput, Prediction
from megagpt.report.text import duration, share

MEANING = {
    "steps": "steps that count",
    "repeated": "steps done again after a restart or a rollback",
    "data": "waiting for data",
    "save": "held up by saves",
    "evaluation": "evaluations",
    "start": "start and end of attempts",
    "compile": "first steps, beyond a usual one",
    "hang": "without progress until the watchdog's end",
    "lost": "between a death and the next start",
}


def goodput_lines(split: Goodput) -> list[str]:
    """Two lines: the split, and what the model expects."""
    parts = [f"{kind} {share(split.seconds[kind] / split.wall)}" for kind in KINDS if split.seconds[kind] > 0]
    attempts = f"{split.attempts} attempt{'s' if split.attempts > 1 else ''}"
    lines = [f"goodput {share(split.share())} of {duration(split.wall)} in {attempts}: {', '.join(parts)}"]
    if split.predicted is not None:
        lines.append(f"  {_comparison(split, split.predicted)}")
    return lines


def _comparison(split: Goodput, expected: Prediction) -> str:
    words = (
        f"Without the first start and evaluations {share(split.comparable)}; Daly's model expects "
        f"{share(expected.share)} at a save of {expected.save:.2g} s every {duration(expected.interval)}"
    )
    if expected.mtbf is None or expected.young_interval is None or expected.daly_interval is None:
        return f"{words} and no failure"
    return (
        f"{words} and a failure every {duration(expected.mtbf)}; best interval {duration(expected.young_interval)} "
        f"(Young), {duration(expected.daly_interval)} (Daly)"
    )


def goodput_section(split: Goodput) -> str:
    """The section of the page: one bar of all kinds, their table, and the comparison."""
    present = [kind for kind in KINDS if split.seconds[kind] > 0]
    pieces = "".join(
        f'<span class="piece {kind}" style="flex-grow:{split.seconds[kind]:.4f}" '
        f'title="{kind}: {escape(share(split.seconds[kind] / split.wall))}"></span>'
        for kind in present
    )
    rows = "".join(
        f'<tr><td><span class="swatch {kind}"></span>{kind}</td><td>{escape(MEANING[kind])}</td>'
        f'<td class="n">{escape(duration(split.seconds[kind]))}</td>'
        f'<td class="n">{escape(share(split.seconds[kind] / split.wall))}</td></tr>'
        for kind in present
    )
    attempts = f"{split.attempts} attempt{'s' if split.attempts > 1 else ''}"
    note = "" if split.predicted is None else f'<p class="note">{escape(_comparison(split, split.predicted))}.</p>'
    return (
        f'<h2>Goodput</h2><figure class="chart"><figcaption>{escape(share(split.share()))} of '
        f"{escape(duration(split.wall))} in {attempts} went into steps that count</figcaption>"
        f'<div class="split">{pieces}</div><table>{rows}</table>{note}</figure>'
    )
