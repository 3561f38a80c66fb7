"""The report of a run: complete, self-contained and safe."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest

from megagpt import config
from megagpt.errors import UserError
from megagpt.report.commands import Report, run_report
from megagpt.report.html import write_report
from megagpt.report.metrics import (
    EvaluationRecord,
    StepRecord,
    open_evaluations,
    open_events,
    open_metrics,
    record_event,
)
from megagpt.report.summary import read_run, summarise

EVIL = '<img src=x onerror="alert(1)">&'
VOID = {"meta", "img", "br", "line", "circle", "polyline"}


class Page(HTMLParser):
    """Every element closed in order, the text, and the attributes that would load something."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.elements = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def a_run(out, steps=30, corpora=("prose", "code"), samples=True):
    out.mkdir(exist_ok=True)
    run = config.Run(
        model=config.Model(layers=2, width=64, heads=2, context=64, vocabulary=512),
        train=config.Train(tokens=40 * 256, global_batch=4, micro_batch=4, precision="fp32"),
    )
    (out / "run.toml").write_text(config.to_toml(run))
    with open_metrics(out, 0) as metrics, open_evaluations(out, 0) as evaluations, open_events(out) as events:
        record_event(events, "started", note=EVIL)
        for step in range(1, steps + 1):
            metrics.append(
                StepRecord(
                    step=step, loss=6.0 - step / 10, grad_norm=1.0, lr=1e-3, tokens=step * 256,
                    tokens_per_s=1000.0 + step, mfu=0.25, hfu=0.25, batch=4, seconds=0.5,
                    data_wait_seconds=0.05, memory_gib=0.5,
                )
            )  # fmt: skip
        for step in (15, 30):
            for corpus in corpora:
                figures = {"loss": 5.0, "perplexity": 148.4, "bits_per_byte": 2.0 + step, "sequences": 8}
                evaluations.append(EvaluationRecord(step=step, tokens=step * 256, corpus=corpus, **figures))
    if samples:
        (out / "samples.json").write_text(json.dumps([{"prompt": "def ", "text": EVIL, "step": 30}]))
        keys = ("unigram_bits_per_byte", "bigram_bits_per_byte", "xz_bits_per_byte", "model_bits_per_byte")
        (out / "yardsticks.json").write_text(json.dumps(dict.fromkeys(keys, 2.0)))
    return out


def test_the_report_is_well_formed_and_loads_nothing(tmp_path):
    text = write_report(a_run(tmp_path / "run")).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert not any({"src", "href", "xlink:href", "onerror"} & set(attributes) for _, attributes in page.elements)
    assert not re.search(r"https?:|url\(|@import", text)


def test_the_report_shows_the_charts_samples_yardsticks_and_the_configuration(tmp_path):
    text = write_report(a_run(tmp_path / "run")).read_text(encoding="utf-8")
    page = Page(text)
    words = "".join(page.texts)
    assert sum(tag == "svg" for tag, _ in page.elements) == 4
    for expected in (
        "Loss",
        "Learning rate",
        "Throughput",
        "Gradient norm",
        "prose",
        "unigram",
        "xz -9",
        "this model",
    ):
        assert expected in words
    assert EVIL in words
    assert "vocabulary = 512" in words
    assert "tokens in 30 of 40 steps" in words


def test_text_from_outside_is_never_markup(tmp_path):
    out = a_run(tmp_path / "<b>run", corpora=(EVIL,))
    page = Page(write_report(out).read_text(encoding="utf-8"))
    assert "img" not in [tag for tag, _ in page.elements]
    assert "".join(page.texts).count("<b>run") >= 2


def test_a_run_of_no_step_yet_has_a_report(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.toml").write_text(config.to_toml(config.Run()))
    assert "no values" in write_report(out).read_text()


def test_lost_losses_and_unknown_peaks_are_shown(tmp_path):
    out = a_run(tmp_path / "run", samples=False)
    path = out / "metrics.jsonl"
    path.write_text(path.read_text().replace('"mfu": 0.25', '"mfu": null').replace('"loss": 3.0', '"loss": null'))
    assert "MFU ?" in write_report(out).read_text()


def test_the_summary_is_of_the_last_evaluation_and_the_last_ten_steps(tmp_path):
    out = a_run(tmp_path / "run")
    summary = summarise(out, read_run(out))
    assert summary.loss == pytest.approx(sum(6.0 - step / 10 for step in range(21, 31)) / 10)
    assert [(record["corpus"], record["step"]) for record in summary.heldout] == [("prose", 30), ("code", 30)]
    assert (summary.step, summary.steps, summary.tokens) == (30, 40, 30 * 256)
    assert summary.tokens_per_s == 1015.5
    assert summary.data_wait == pytest.approx(0.1)
    assert summary.seconds == pytest.approx(15.0)


def test_the_command_prints_json_or_writes_the_page(tmp_path, capsys):
    out = a_run(tmp_path / "run")
    assert run_report(Report(run=out, json=True)) == 0
    assert json.loads(capsys.readouterr().out) == dataclasses.asdict(summarise(out, read_run(out)))
    assert not (out / "report.html").exists()
    run_report(Report(run=out))
    assert capsys.readouterr().out.strip() == str(out / "report.html")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"run\.toml"):
        write_report(tmp_path)


@pytest.mark.parametrize("content", ["[", "{}", "\udcff"])
def test_a_broken_samples_file_is_named(tmp_path, content):
    out = a_run(tmp_path / "run")
    (out / "samples.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"samples\.json"):
        write_report(out)
