"""The tools that look at a run's data from outside it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megagpt.commands import data as tools
from megagpt.commands.data import Mix, Replay, Stats, Which, run_mix, run_replay, run_stats, run_which
from megagpt.config import Data, Model, Run, Train, to_toml
from megagpt.data.batch import IGNORE
from megagpt.data.build import build
from megagpt.data.corpus import open_corpus
from megagpt.data.loader import train_steps
from megagpt.data.order import Packing
from megagpt.data.task import Recipe
from megagpt.errors import UserError
from tests.data.test_build import texts

T = 32


@pytest.fixture
def corpora(tmp_path: Path) -> list[Path]:
    """Two corpora from several files, with documents left out in every way."""
    folders: list[Path] = []
    for name, seed in (("prose", 1), ("code", 5)):
        raw = tmp_path / f"raw-{name}"
        raw.mkdir()
        documents = texts(seed, 70)
        for file, part in (("a", documents[:40]), ("b", ["", *documents[30:]])):
            lines = [json.dumps({"text": text, "score": number}) for number, text in enumerate(part)]
            (raw / f"{file}.jsonl").write_text("\n\n".join(lines))  # blank lines are no documents, and are counted
        recipe = Recipe(heldout=0.1, tasks=3, vocabulary=300, deduplicate=True, where=("score!=5",))
        tokenizer = folders[0] if folders else None
        build([str(raw)], tmp_path / name, tokenizer=tokenizer, recipe=recipe, processes=1)
        folders.append(tmp_path / name)
    return folders


MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(corpora: list[Path], tmp_path: Path) -> MakeRun:
    def make(packing: Packing = "chunk", **data: Any) -> Path:
        run = Run(
            model=Model(context=T),
            data=Data(mixture={str(corpora[0]): 2, str(corpora[1]): 1}, packing=packing, **data),
            train=Train(global_batch=6, micro_batch=2, tokens=100 * T),
            parallel=dataclasses.replace(Run().parallel, data=3),
        )
        out = tmp_path / "run"
        out.mkdir(exist_ok=True)
        (out / "run.toml").write_text(to_toml(run))
        return out

    return make


def batch_of_step(out: Path, step: int, data_rank: int) -> tuple[np.ndarray, np.ndarray]:
    """What the loader itself gives: its tokens and each row's last target, and which rows have that target."""
    _, cursor, corpora = tools.open_run(out)
    steps = train_steps(
        corpora,
        cursor,
        global_batch=lambda _: 6,
        micro_batch=2,
        data_rank=data_rank,
        data_ranks=3,
        document_mask=False,
        pin=False,
    )
    for _ in range(step - 1):
        next(steps)
    batch = next(steps)[0]
    last = batch.targets_BT[:, -1:]
    return torch.cat([batch.tokens_BT, last], dim=1).numpy(), last.numpy() != IGNORE


@pytest.mark.parametrize("packing", ["chunk", "best_fit"])
def test_replay_gives_what_the_loader_gave(
    make_run: MakeRun, tmp_path: Path, packing: Packing, capsys: pytest.CaptureFixture
) -> None:
    out = make_run(packing)
    run_replay(Replay(run=out, step=4, rank=1, out=tmp_path / "batch.npy"))
    found, (expected, whole) = np.load(tmp_path / "batch.npy"), batch_of_step(out, 4, 1)
    assert np.array_equal(found[:, :-1], expected[:, :-1])
    assert whole.any()
    assert np.array_equal(found[:, -1:][whole], expected[:, -1:][whole])
    run_replay(Replay(run=out, step=4, json=True))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["position"] for row in rows] == list(range(18, 24))
    assert all(row["text"] for row in rows)


@pytest.mark.parametrize("packing", ["chunk", "best_fit"])
def test_which_names_the_line_that_each_document_came_from(
    make_run: MakeRun, packing: Packing, capsys: pytest.CaptureFixture
) -> None:
    out = make_run(packing)
    run_which(Which(run=out, step=3, json=True))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    run_replay(Replay(run=out, step=3, json=True))
    replayed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 6
    for row, replay in zip(rows, replayed, strict=True):
        found = []
        for document in row["documents"]:
            line = Path(document["path"]).read_text().splitlines()[document["row"] - 1]
            found.append(json.loads(line)["text"] + "<|endoftext|>")
        text = replay["text"]
        if packing == "best_fit":  # pieces in any order: each is part of one of the named documents
            pieces = [piece for piece in text.split("<|endoftext|>") if piece]
            assert len(pieces) == len(found)
            assert all(piece in document for piece, document in zip(pieces, found, strict=True))
        else:
            assert text in "".join(found)
            assert all(part in text for part in found[1:-1]), "no document is named that is not in it"


def test_which_tells_the_file_where_the_raw_input_is_gone(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = make_run()
    run_which(Which(run=out, step=2))
    exact = [line.rpartition(":")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    for path in tmp_path.glob("raw-*/*"):
        path.unlink()
    run_which(Which(run=out, step=2))
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")] == exact


def test_a_recorded_step_is_read_from_the_metrics(make_run: MakeRun) -> None:
    out = make_run()
    records = [{"step": 7, "tokens": 90 * T, "batch": 12}, {"step": 7, "tokens": 80 * T, "batch": 4}]
    (out / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run, cursor, _ = tools.open_run(out)
    assert tools.rows_of_step(out, run, cursor, [], step=7, data_rank=None).samples.tolist() == [76, 77, 78, 79]
    assert tools.rows_of_step(out, run, cursor, [], step=2, data_rank=2).samples.tolist() == [10, 11]


def test_steps_and_ranks_that_are_none_are_refused(make_run: MakeRun) -> None:
    out = make_run()
    with pytest.raises(UserError, match="--step 0 is no step"):
        run_which(Which(run=out, step=0))
    with pytest.raises(UserError, match="--rank 3 is no data rank: the run has 3"):
        run_which(Which(run=out, step=1, rank=3))


def test_mix_says_tokens_epochs_and_how_well_a_window_shuffles(
    make_run: MakeRun, capsys: pytest.CaptureFixture
) -> None:
    path = str(make_run() / "run.toml")
    run_mix(Mix(run=path, tokens=900 * T, window=2, json=True))
    prose, code = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (prose["tokens"], code["tokens"]) == (600 * T, 300 * T)
    assert prose["epochs"] == pytest.approx(600 / prose["sequences"])
    assert 1 <= prose["shards_in_1024_sequences"] <= prose["of_a_full_shuffle"] <= 3
    run_mix(Mix(run=path, mixture=(code["corpus"], "1"), tokens=64 * T))
    assert capsys.readouterr().out.startswith(f"{code['corpus']}: {64 * T:,} tokens, ")
    with pytest.raises(UserError, match="data.max_epochs = 1 allows no more"):
        run_mix(Mix(run=str(make_run(max_epochs=1) / "run.toml"), tokens=10**6))
    with pytest.raises(UserError, match="is not CORPUS WEIGHT"):
        run_mix(Mix(run=path, mixture=("a", "0")))


def test_stats_add_up_to_the_manifest(corpora: list[Path], capsys: pytest.CaptureFixture) -> None:
    run_stats(Stats(corpus=corpora[0], json=True))
    files = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    manifest = open_corpus(corpora[0]).manifest
    assert [Path(file["path"]).name for file in files] == ["a.jsonl", "b.jsonl"]
    for name in ("documents", "tokens", "text_bytes"):
        assert sum(file[name] for file in files) == sum(getattr(counts, name) for counts in manifest.counts.values())
    assert sum(file.get("repeated", 0) for file in files) == manifest.left_out["repeated"] > 5
    assert sum(file.get("filtered", 0) for file in files) == manifest.left_out["filtered"] > 0
    run_stats(Stats(corpus=corpora[0]))
    assert "1 empty" in capsys.readouterr().out
    (corpora[0] / "statistics.json").unlink()
    with pytest.raises(UserError, match="does not say where its documents came from"):
        run_stats(Stats(corpus=corpora[0]))
