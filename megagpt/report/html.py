"""report.html: one run on one self-contained page, from the files in its folder: open or send it anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from megagpt import __version__, config
from megagpt.files import write_whole
from megagpt.report.charts import Series, bar_chart, line_chart, smoothed
from megagpt.report.goodput import goodput_section
from megagpt.report.page import SCRIPT, STYLE
from megagpt.report.summary import RunFiles, Summary, read_run, summarise
from megagpt.report.text import count, duration, share

YARDSTICKS = (
    ("unigram_bits_per_byte", "unigram"),
    ("bigram_bits_per_byte", "bigram"),
    ("xz_bits_per_byte", "xz -9"),
    ("model_bits_per_byte", "this model"),
)


def write_report(out: Path) -> Path:
    """Write `out`/report.html and return its path; any moment of a run will do.

    Raises UserError if `out` is not the folder of a run, or if one of the files read is broken.
    """
    files = read_run(out)
    path = out / "report.html"
    write_whole(path, page(files, summarise(out, files)))
    return path


def page(files: RunFiles, summary: Summary) -> str:
    """The whole page."""
    title = escape(summary.run)
    body = "".join(
        (
            f'<p class="mark">megagpt</p><h1>{title}</h1><p class="model">{escape(_model(files.run))}</p>',
            _stats(summary),
            _charts(files),
            _heldout(summary),
            "" if summary.goodput is None else goodput_section(summary.goodput),
            _samples(files.samples),
            "<h2>Configuration and events</h2>",
            f"<details><summary>run.toml, every setting</summary><pre>{escape(files.toml)}</pre></details>",
            _events(files.events),
            f"<footer>Written by megagpt {__version__}. megagpt report {title} writes it again.</footer>",
        )
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title} | megagpt</title><style>{STYLE}</style></head>\n"
        f"<body><main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _model(run: config.Run) -> str:
    model, parallel, train = run.model, run.parallel, run.train
    attention = "dense" if model.window is None else f"dense and {model.window:,}-token banded"
    layout = f"data {parallel.data} x pipeline {parallel.pipeline} x tensor {parallel.tensor}"
    return (
        f"{model.layers} layers of width {model.width:,}, {model.heads} heads, {attention} attention over "
        f"{model.context:,} tokens, vocabulary {model.vocabulary:,}. {train.precision}, {layout}, "
        f"ZeRO {parallel.zero_stage}."
    )


def _stats(summary: Summary) -> str:
    bits = [record["bits_per_byte"] for record in summary.heldout if record["bits_per_byte"] is not None]
    of = f"tokens in {summary.step:,}" + ("" if summary.step == summary.steps else f" of {summary.steps:,}") + " steps"
    tiles = [
        (count(summary.parameters), "parameters"),
        (count(summary.tokens), of),
        ("-" if summary.loss is None else f"{summary.loss:.3f}", "training loss, nats a token, last 10 steps"),
        (
            f"{sum(bits) / len(bits):.3f}" if bits else "-",
            "held-out bits per byte" + (", mean" if len(bits) > 1 else ""),
        ),
        (
            "-" if summary.tokens_per_s is None else count(summary.tokens_per_s),
            f"tokens per second, MFU {share(summary.mfu)}",
        ),
        (duration(summary.seconds), f"in training steps, {share(summary.data_wait)} of it waiting for data"),
    ]
    cards = "".join(
        f'<div class="stat"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in tiles
    )
    return f'<section class="stats">{cards}</section>'


def _charts(files: RunFiles) -> str:
    losses = _points(files.steps, "loss")
    loss = [
        Series(name="training loss, each step", points=losses, kind="faint", digits=".4f"),
        Series(name="smoothed", points=smoothed(losses), digits=".4f"),
    ]
    corpora = {record["corpus"]: None for record in files.evaluations}
    for number, corpus in enumerate(corpora):
        own = [record for record in files.evaluations if record["corpus"] == corpus]
        loss.append(
            Series(
                name=f"held out: {corpus}",
                points=_points(own, "loss"),
                colour=2 + number % 3,
                kind="dots",
                digits=".4f",
            )
        )
    return (
        f'{line_chart("Loss, nats a token", loss, width=1032, height=380)}<div class="trio">{_trio(files.steps)}</div>'
    )


def _trio(steps: Sequence[dict[str, Any]]) -> str:
    width, height = 340, 200
    rate = Series(name="learning rate", points=_points(steps, "lr"), colour=3, digits=".3e")
    speed = Series(name="throughput", points=_points(steps, "tokens_per_s"), digits=",.0f", unit=" tokens/s")
    norm = Series(name="gradient norm", points=_points(steps, "grad_norm"), colour=4)
    norms = [value for _, value in norm.points if value > 0 and math.isfinite(value)]
    spread = bool(norms) and max(norms) > 30 * min(norms)
    return (
        line_chart("Learning rate", [rate], width=width, height=height, zero=True)
        + line_chart("Throughput, tokens per second", [speed], width=width, height=height, zero=True)
        + line_chart("Gradient norm", [norm], width=width, height=height, zero=True, log=spread)
    )


def _heldout(summary: Summary) -> str:
    parts: list[str] = []
    if summary.heldout:
        rows = [
            [
                record["corpus"],
                _number(record["loss"], ".4f"),
                _number(record["perplexity"], ",.2f"),
                _number(record["bits_per_byte"], ".4f"),
                f"{record['step']:,}",
            ]
            for record in summary.heldout
        ]
        table = _table(["corpus", "loss", "perplexity", "bits per byte", "at step"], rows)
        parts.append(f'<figure class="chart"><figcaption>Last evaluation</figcaption>{table}</figure>')
    bars = [
        (name, summary.yardsticks[key], key == "model_bits_per_byte")
        for key, name in YARDSTICKS
        if key in summary.yardsticks
    ]
    if bars:
        note = "Bits per byte of the same held-out text; lower is better. Unigram and bigram saw the training tokens."
        parts.append(bar_chart("Beside simple yardsticks", bars, note=note))
    return f'<h2>Held-out documents</h2><div class="pair">{"".join(parts)}</div>' if parts else ""


def _samples(samples: Sequence[dict[str, Any]]) -> str:
    if not samples:
        return ""
    cards = "".join(
        f'<div class="sample"><small>after step {sample["step"]:,}</small>'
        f'<pre><span class="prompt">{escape(sample["prompt"])}</span>{escape(sample["text"])}</pre></div>'
        for sample in samples
    )
    return f"<h2>Samples</h2>{cards}"


def _events(events: Sequence[dict[str, Any]]) -> str:
    if not events:
        return ""
    rows = [
        [
            str(event.get("time", "")).replace("T", " ").replace("+00:00", " UTC"),
            str(event.get("event", "")),
            ", ".join(f"{name} {value}" for name, value in event.items() if name not in ("time", "event")),
        ]
        for event in events
    ]
    table = _table(["time", "event", "details"], rows, numbers=False)
    return f"<details><summary>Events, {len(events):,}</summary>{table}</details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        kinds = ["", *([' class="n"' if numbers else ""] * (len(cells) - 1))]
        inner = "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
        return f"<tr>{inner}</tr>"

    return f"<table>{row(head, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"


def _points(records: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(record["step"], math.nan if record[key] is None else record[key]) for record in records]


def _number(value: float | None, digits: str) -> str:
    return "-" if value is None else f"{value:{digits}}"
