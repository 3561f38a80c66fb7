from __future__ import annotations

import fcntl
import gzip
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megagpt import files
from megagpt.data import build as build_module
from megagpt.data import sources
from megagpt.data import task as task_module
from megagpt.data.build import build
from megagpt.data.corpus import open_corpus, verify
from megagpt.data.manifest import Manifest
from megagpt.data.task import PREPARATION, Job, Recipe, run_task
from megagpt.data.tokenizer import train_tokenizer
from megagpt.errors import UserError

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
RECIPE = Recipe(heldout=0.2, tasks=6, block_tokens=300, vocabulary=300)


def texts(seed: int, count: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, int(generator.integers(1, 200)))) for _ in range(count)]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Raw text of every kind, with an empty document."""
    folder = tmp_path / "raw"
    (folder / "sub").mkdir(parents=True)
    lines = [json.dumps({"text": text}) for text in [*texts(1, 120), ""]]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    pq.write_table(pa.table({"text": texts(2, 60)}), folder / "b.parquet", row_group_size=20)
    for number, text in enumerate(texts(3, 20)):
        (folder / "sub" / f"{number:02d}.txt").write_text(text)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def built(raw: Path, out: Path, *, processes: int = 1, recipe: Recipe = RECIPE) -> Manifest:
    return build([str(raw)], out, tokenizer=None, recipe=recipe, processes=processes)


def test_any_number_of_processes_gives_the_same_bytes(raw: Path, tmp_path: Path) -> None:
    manifest = built(raw, tmp_path / "one")
    assert len(manifest.shards_of("train")) >= 6
    whole = contents(tmp_path / "one")
    for processes in (2, 3):
        built(raw, tmp_path / str(processes), processes=processes)
        assert contents(tmp_path / str(processes)) == whole
    assert {Path(name).suffix for name in whole} == {".tar", ".index", ".json"}


def test_the_corpus_holds_every_text_once_and_counts_right(raw: Path, tmp_path: Path) -> None:
    manifest = built(raw, tmp_path / "out")
    corpus = open_corpus(tmp_path / "out")
    tokenizer = corpus.tokenizer()
    found: list[str] = []
    for name in ("train", "heldout"):
        split, counts = corpus.split(name), manifest.counts[name]
        documents = tokenizer.decode(split.read(0, split.tokens)).split("<|endoftext|>")
        assert documents.pop() == ""
        assert counts.documents == split.documents == len(documents) == sum(counts.histogram)
        assert counts.tokens == split.tokens
        assert counts.text_bytes == sum(len(text) for text in documents)
        found += documents
    assert sorted(found) == sorted(texts(1, 120) + texts(2, 60) + texts(3, 20))
    assert manifest.empty_documents == 1
    assert manifest.source_files == 22
    assert 15 < manifest.counts["heldout"].documents < 65
    assert verify(tmp_path / "out", repair=False) == []


def test_equal_texts_are_held_out_together(tmp_path: Path) -> None:
    for name, seeds in (("a.jsonl", (1,)), ("b.jsonl", (1, 1))):
        lines = [json.dumps({"text": text}) for seed in seeds for text in texts(seed, 60)]
        (tmp_path / name).write_text("\n".join(lines))
    one, two = (built(tmp_path / name, tmp_path / f"out-{name}") for name in ("a.jsonl", "b.jsonl"))
    assert two.counts["heldout"].documents == 2 * one.counts["heldout"].documents > 0


def test_a_full_shard_is_followed_by_another_part(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_module, "_SHARD_TOKENS", 700)
    manifest = built(raw, tmp_path / "out")
    assert any(entry.name.endswith("-01") for entry in manifest.shards)
    assert all(entry.tokens <= 700 for entry in manifest.shards)
    assert sum(entry.documents for entry in manifest.shards) == 200
    assert verify(tmp_path / "out", repair=False) == []


def test_a_build_stopped_at_any_write_leaves_nothing_half_written_and_goes_on(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(raw, tmp_path / "whole")
    out, stop_at, stopped = tmp_path / "out", 0, True
    replace = Path.replace
    while stopped:
        stop_at, writes = stop_at + 5, 0

        def interrupted(path: Path, target: Path, stop_at: int = stop_at) -> Path:
            nonlocal writes
            writes += 1
            if writes == stop_at:
                raise KeyboardInterrupt
            return replace(path, target)

        monkeypatch.setattr(files.Path, "replace", interrupted)
        try:
            built(raw, out)
            stopped = False
        except KeyboardInterrupt:
            assert not (out / "manifest.json").exists()
            assert list(out.rglob("*.tmp")) == []
    assert stop_at > 15, "the build was stopped several times"
    assert contents(out) == contents(tmp_path / "whole")


KILLED = Recipe(heldout=0.1, tasks=24, vocabulary=300)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_build_that_is_killed_or_interrupted_goes_on_to_the_same_bytes(tmp_path: Path, number: int) -> None:
    raw, out = tmp_path / "raw.jsonl", tmp_path / "out"
    raw.write_text("".join(json.dumps({"text": text * 6}) + "\n" for text in texts(4, 600)))
    victim = multiprocessing.get_context("forkserver").Process(target=build_with_two_processes, args=(raw, out))
    victim.start()
    while not list((out / PREPARATION).glob("0*.json")) and victim.is_alive():
        time.sleep(0.005)
    assert victim.pid
    os.kill(victim.pid, number)
    victim.join()
    assert victim.exitcode == (-number if number == signal.SIGKILL else 3)
    assert number == signal.SIGKILL or list(out.rglob("*.tmp")) == []
    assert 1 <= len(list((out / PREPARATION).glob("0*.json"))) < KILLED.tasks
    assert not (out / "manifest.json").exists()
    built(raw, out, processes=2, recipe=KILLED)
    built(raw, tmp_path / "whole", recipe=KILLED)
    assert contents(out) == contents(tmp_path / "whole")


def build_with_two_processes(raw: Path, out: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        built(raw, out, processes=2, recipe=KILLED)
    except KeyboardInterrupt:
        sys.exit(3)


def test_a_finished_corpus_is_left_as_it_is_and_another_is_not_overwritten(raw: Path, tmp_path: Path) -> None:
    first = built(raw, tmp_path / "out")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert built(raw, tmp_path / "out", processes=2) == first
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times
    with pytest.raises(UserError, match="already holds a corpus, built from other input or options"):
        built(raw / "sub", tmp_path / "out")
    with pytest.raises(UserError, match="already holds a corpus"):
        built(raw, tmp_path / "out", recipe=Recipe(heldout=0.2, tasks=6, block_tokens=301, vocabulary=300))


def stop_in_the_middle(raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "run_tasks", stop)
        with pytest.raises(KeyboardInterrupt):
            built(raw, out)


def test_an_unfinished_build_is_not_continued_with_something_else(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stop_in_the_middle(raw, out, monkeypatch)
    with pytest.raises(UserError, match="holds an unfinished build with other options"):
        built(raw, out, recipe=Recipe(heldout=0.3, tasks=6, block_tokens=300, vocabulary=300))
    file = raw / "sub" / "00.txt"
    os.utime(file, ns=(1, 1))
    with pytest.raises(UserError, match="holds an unfinished build with other changed files"):
        built(raw, out)


def test_a_finished_task_whose_shard_was_lost_is_done_again(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "save_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            built(raw, out)
    (out / "train-00002-00.tar").unlink()
    built(raw, out)
    built(raw, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_task_reports_all_the_bytes_that_were_foreseen(raw: Path, tmp_path: Path) -> None:
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress((raw / "a.jsonl").read_bytes()))
    slices = [
        piece
        for task in sources.cut([str(raw / "b.parquet"), str(packed)], column="text", tasks=3, largest=10**9)
        for piece in task
    ]
    (tmp_path / "out" / PREPARATION).mkdir(parents=True)
    tokenizer = train_tokenizer([], 257)
    reported: list[int] = []
    run_task(Job(tmp_path / "out", RECIPE, tokenizer.definition, 0), (0, slices), reported.append)
    assert sum(reported) == sum(piece.text_bytes for piece in slices)


def test_two_builds_do_not_write_to_one_folder(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    stop_in_the_middle(raw, out, monkeypatch)
    with (out / PREPARATION / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another build is writing to"):
            built(raw, out)
    built(raw, out)


def test_a_tokenizer_is_taken_from_another_corpus(raw: Path, tmp_path: Path) -> None:
    one = built(raw, tmp_path / "one")
    two = build([str(raw / "sub")], tmp_path / "two", tokenizer=tmp_path / "one", recipe=RECIPE, processes=1)
    assert two.tokenizer_sha256 == one.tokenizer_sha256
    assert (tmp_path / "two/tokenizer.json").read_bytes() == (tmp_path / "one/tokenizer.json").read_bytes()
    other = tmp_path / "other.json"
    other.write_text(train_tokenizer(["x x x"], 260).definition)
    with pytest.raises(UserError, match="already holds a corpus"):
        build([str(raw / "sub")], tmp_path / "two", tokenizer=other, recipe=RECIPE, processes=1)


def test_too_little_disk_is_noticed_before_a_shard_is_begun(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match="the corpus needs"):
        built(raw, tmp_path / "out")
    assert list((tmp_path / "out").glob("*.tar")) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_a_broken_line_ends_the_build_in_any_process(raw: Path, tmp_path: Path, processes: int) -> None:
    with (raw / "a.jsonl").open("a") as file:
        file.write("broken\n")
    recipe = Recipe(heldout=0.2, tasks=6, vocabulary=300)
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(train_tokenizer(WORDS, 300).definition)
    with pytest.raises(UserError, match=r"a\.jsonl:122 is not JSON"):
        build([str(raw)], tmp_path / "out", tokenizer=tokenizer, recipe=recipe, processes=processes)
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize("content", ["", '{"text": ""}\n{"text": null}\n'])
def test_an_empty_corpus_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match="no document is left to train on: 0 were held out"):
        built(tmp_path / "a.jsonl", tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize(
    ("recipe", "processes", "message"),
    [
        (Recipe(heldout=1.0), 1, r"heldout = 1\.0 must be at least 0 and below 1"),
        (Recipe(heldout=-0.1), 1, "heldout = -0"),
        (Recipe(tasks=0), 1, "tasks = 0 must be at least 1"),
        (Recipe(), 0, "processes = 0 must be at least 1"),
        (Recipe(vocabulary=256), 1, "vocabulary = 256 must be at least 257"),
    ],
)
def test_impossible_options_are_refused(
    raw: Path, tmp_path: Path, recipe: Recipe, processes: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        built(raw, tmp_path / "out", recipe=recipe, processes=processes)


def test_a_place_that_cannot_be_a_folder_is_one_error(tmp_path: Path) -> None:
    raw = tmp_path / "raw.jsonl"
    raw.write_text('{"text": "one"}\n')
    with pytest.raises(UserError, match=r"--out .*raw\.jsonl cannot be made: (Not a directory|File exists)"):
        build([str(raw)], raw, tokenizer=None, recipe=Recipe(vocabulary=257), processes=1)
