from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megagpt.data import choose
from megagpt.data import task as task_module
from megagpt.data.build import build, build_part
from megagpt.data.choose import find_repeats, load_filter, parse_condition
from megagpt.data.corpus import open_corpus
from megagpt.data.manifest import Manifest
from megagpt.data.task import PREPARATION, Recipe, hash_task
from megagpt.data.tokenizer import train_tokenizer
from megagpt.errors import UserError
from tests.data.test_build import contents, texts


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Three files in which some texts come twice, near each other and far apart."""
    folder = tmp_path / "raw"
    folder.mkdir()
    one, two = texts(1, 90), texts(2, 60)
    for name, documents in (("a", one), ("b", one[20:40] + two), ("c", two[:30] + two[5:9] + texts(3, 40))):
        lines = [
            json.dumps({"text": text, "score": number, "lang": "de" if number % 3 else "en"})
            for number, text in enumerate(documents)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    path.write_text(train_tokenizer(texts(1, 20), 300).definition)
    return path


def documents(folder: Path) -> list[str]:
    corpus = open_corpus(folder)
    found = []
    for name in ("train", "heldout"):
        split = corpus.split(name)
        found += corpus.tokenizer().decode(split.read(0, split.tokens)).split("<|endoftext|>")[:-1]
    return found


def built(raw: Path, out: Path, tokenizer: Path, *, processes: int = 1, **recipe: Any) -> Manifest:
    options = Recipe(heldout=0.2, tasks=5, block_tokens=300, vocabulary=300, **recipe)
    return build([str(raw)], out, tokenizer=tokenizer, recipe=options, processes=processes)


@pytest.mark.parametrize(
    ("words", "record", "holds"),
    [
        ("score>=2", {"score": 10}, True),
        ("score<2", {"score": 10}, False),
        ("score=2.0", {"score": "2"}, True),
        ("lang=de", {"lang": "de"}, True),
        ("lang!=de", {"lang": None}, False),
        ("lang!=de", {"lang": "en"}, True),
        ("good=true", {"good": True}, True),
        ("url=https://a?b=c", {"url": "https://a?b=c"}, True),
        ("lang>b", {"lang": "a"}, False),
    ],
)
def test_a_condition_compares_numbers_as_numbers_and_the_rest_as_text(words: str, record: dict, holds: bool) -> None:
    assert parse_condition(words).holds(record) is holds


def test_conditions_take_documents_by_other_columns(raw: Path, tokenizer: Path, tmp_path: Path) -> None:
    manifest = built(raw / "a.jsonl", tmp_path / "out", tokenizer, where=("score>=10", "lang=en"))
    expected = [text for number, text in enumerate(texts(1, 90)) if number >= 10 and number % 3 == 0]
    assert sorted(documents(tmp_path / "out")) == sorted(expected)
    assert manifest.left_out == {"filtered": 90 - len(expected)}
    table = pa.table({"text": texts(1, 90), "score": range(90)})
    pq.write_table(table, raw / "d.parquet", row_group_size=40)
    built(raw / "d.parquet", tmp_path / "parquet", tokenizer, where=("score<7",))
    assert sorted(documents(tmp_path / "parquet")) == sorted(texts(1, 90)[:7])
    with pytest.raises(UserError, match=r"d\.parquet has no column 'stars'"):
        built(raw / "d.parquet", tmp_path / "none", tokenizer, where=("stars<7",))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_function_of_the_user_takes_documents(raw: Path, tokenizer: Path, tmp_path: Path, processes: int) -> None:
    source = tmp_path / "mine.py"
    source.write_text("def long(text):\n    return len(text) > 400\n")
    _, digest = load_filter(f"{source}:long")
    recipe: dict[str, Any] = {"filter": f"{source}:long", "filter_sha256": digest}
    built(raw / "a.jsonl", tmp_path / "out", tokenizer, processes=processes, **recipe)
    assert sorted(documents(tmp_path / "out")) == sorted(text for text in texts(1, 90) if len(text) > 400)
    source.write_text("def long(text):\n    return len(text) > 500\n")
    with pytest.raises(UserError, match="the source of --filter .* changed"):
        built(raw / "a.jsonl", tmp_path / "out", tokenizer, **recipe)


def test_a_function_that_fails_or_answers_no_bool_is_named_with_file_and_line(
    raw: Path, tokenizer: Path, tmp_path: Path
) -> None:
    source = tmp_path / "mine.py"
    source.write_text("def f(text):\n    return 1 / 0\n\ndef g(text):\n    return 'yes'\n")
    for name, message in (("f", r"a\.jsonl:1: ZeroDivisionError"), ("g", r"returned 'yes' at .*a\.jsonl:1")):
        full, digest = f"{source}:{name}", load_filter(f"{source}:{name}")[1]
        with pytest.raises(UserError, match=message):
            built(raw, tmp_path / name, tokenizer, filter=full, filter_sha256=digest)
    for name in (f"{source}:h", "no.such.module:f", "words"):
        with pytest.raises(UserError, match="is no function that can be loaded"):
            load_filter(name)


@pytest.mark.parametrize("words", ["score", "=3", "score ~ 3"])
def test_a_condition_without_column_or_relation_is_refused(words: str) -> None:
    with pytest.raises(UserError, match="is no condition"):
        parse_condition(words)


def test_repeats_are_left_out_alike_by_any_processes_and_parts(
    raw: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = built(raw, tmp_path / "one", tokenizer, deduplicate=True)
    expected = dict.fromkeys([*texts(1, 90), *texts(2, 60), *texts(3, 40)])
    assert sorted(documents(tmp_path / "one")) == sorted(expected)
    assert manifest.left_out == {"repeated": 20 + 34}
    built(raw, tmp_path / "two", tokenizer, processes=2, deduplicate=True)
    monkeypatch.setattr(choose, "_PART", 16)
    recipe = Recipe(heldout=0.2, tasks=5, block_tokens=300, vocabulary=300, deduplicate=True)
    ends = [
        build_part([str(raw)], tmp_path / "parts", part=part, parts=3, tokenizer=tokenizer, recipe=recipe, processes=1)
        for part in (2, 0, 1, 0, 2)
    ]
    assert [end is None for end in ends] == [True, True, True, True, False]
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "parts")


def test_equal_hashes_of_the_first_in_order_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    files = [generator.integers(0, 50, (count, 1)).repeat(2, axis=1).astype(">u8") for count in (40, 0, 60)]
    for number, values in enumerate(files):
        (tmp_path / f"{number}.hashes").write_bytes(values.tobytes())
    monkeypatch.setattr(choose, "_PART", 8)
    names = [tmp_path / f"{number}" for number in range(3)]
    find_repeats([path.with_suffix(".hashes") for path in names], [path.with_suffix(".bytes") for path in names])
    seen: set[int] = set()
    for path, values in zip(names, files, strict=True):
        flags = path.with_suffix(".bytes").read_bytes()
        for value, flag in zip(values[:, 0].tolist(), flags, strict=True):
            assert flag == (value in seen)
            seen.add(value)


def test_parts_that_run_side_by_side_and_again_give_what_one_build_gives(
    raw: Path, tokenizer: Path, tmp_path: Path
) -> None:
    built(raw, tmp_path / "one", tokenizer)
    recipe = Recipe(heldout=0.2, tasks=5, block_tokens=300, vocabulary=300)
    for part in (3, 1, 1, 0, 2):
        end = build_part(
            [str(raw)], tmp_path / "out", part=part, parts=4, tokenizer=tokenizer, recipe=recipe, processes=1
        )
        assert (end is None) == (part != 2)
        assert (tmp_path / "out" / PREPARATION).exists() == (end is None)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    with pytest.raises(UserError, match="--task 4/4 is no part"):
        build_part([str(raw)], tmp_path / "x", part=4, parts=4, tokenizer=tokenizer, recipe=recipe, processes=1)


def test_a_build_stopped_between_hashing_and_writing_goes_on(
    raw: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(raw, tmp_path / "one", tokenizer, deduplicate=True)
    done = 0

    def stopping(*arguments: Any) -> None:
        nonlocal done
        done += 1
        if done == 3:
            raise KeyboardInterrupt
        hash_task(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("megagpt.data.build.hash_task", stopping)
        with pytest.raises(KeyboardInterrupt):
            built(raw, tmp_path / "out", tokenizer, deduplicate=True)
    assert not list((tmp_path / "out").glob("repeats*"))
    with monkeypatch.context() as patch:
        patch.setattr(task_module, "hash_of", None)
        with pytest.raises(TypeError):
            built(raw, tmp_path / "out", tokenizer, deduplicate=True)
    built(raw, tmp_path / "out", tokenizer, deduplicate=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
