from __future__ import annotations

import json
from pathlib import Path

import pytest
import tyro

from megagpt.data.commands import Build, Inspect, Verify, run_build, run_inspect, run_verify
from megagpt.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> Path:
    raw = tmp_path / "raw.jsonl"
    raw.write_text("".join(json.dumps({"body": f"document {number} " * number}) + "\n" for number in range(1, 60)))
    run_build(
        Build(
            inputs=(str(raw),),
            out=tmp_path / "corpus",
            column="body",
            vocabulary=300,
            heldout=0.2,
            processes=1,
            tasks=2,
        )
    )
    capsys.readouterr()
    return tmp_path / "corpus"


def test_the_options_are_a_command_line() -> None:
    parsed = tyro.cli(Build, args=["a.jsonl", "b", "--out", "c", "--heldout", "0.1", "--json"])
    assert (parsed.inputs, parsed.out, parsed.heldout, parsed.json) == (("a.jsonl", "b"), Path("c"), 0.1, True)
    assert tyro.cli(Inspect, args=["c"]).corpus == tyro.cli(Verify, args=["c", "--repair"]).corpus == "c"


def test_inspect_shows_counts_lengths_and_excerpts(folder: Path, capsys: pytest.CaptureFixture) -> None:
    run_inspect(Inspect(corpus=str(folder), documents=2))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [str(folder), "train", "held", "out"]
    train, heldout = (int(count) for count in lines[1].split()[1:])
    assert train + heldout == 59
    assert any(line.startswith("16 to 31") for line in lines)
    assert lines[-2].endswith(" tokens: document 1")
    assert max(len(line) for line in lines) < 200


def test_inspect_prints_json(folder: Path, capsys: pytest.CaptureFixture) -> None:
    run_inspect(Inspect(corpus=str(folder), documents=1, json=True))
    content = json.loads(capsys.readouterr().out)
    assert sum(split["documents"] for split in content["splits"].values()) == 59
    assert content["options"]["column"] == "body"
    assert content["excerpts"][0]["text"].startswith("document 1 ")


def test_build_prints_a_summary_and_says_when_nothing_was_held_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    build = Build(
        inputs=(str(tmp_path / "raw.jsonl"),),
        out=tmp_path / "x",
        tokenizer=folder,
        column="body",
        heldout=1e-9,
        processes=1,
    )
    run_build(build)
    out = capsys.readouterr().out
    assert out.splitlines()[1].split() == ["documents", "59", "0"]
    assert "no document was held out" in out
    run_build(Build(**{**vars(build), "json": True}))
    assert json.loads(capsys.readouterr().out)["splits"]["train"]["documents"] == 59


def test_verify_says_that_all_is_well_or_fails_naming_files(folder: Path, capsys: pytest.CaptureFixture) -> None:
    run_verify(Verify(corpus=str(folder)))
    assert capsys.readouterr().out.endswith("shards, every hash matches.\n")
    index = next(folder.glob("train*.index"))
    index.unlink()
    with pytest.raises(UserError, match=r"the corpus .* has 1 broken file\."):
        run_verify(Verify(corpus=str(folder), json=True))
    assert json.loads(capsys.readouterr().out)["problems"] == [
        f"{index} is missing or broken; --repair makes it from the tar."
    ]
    run_verify(Verify(corpus=str(folder), repair=True))
    assert index.is_file()
