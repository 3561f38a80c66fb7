"""`megagpt checkpoint ...` on a small state: what it prints, and its one error for each kind of bad input."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from megagpt import cli, config
from megagpt.checkpoint import lineage
from megagpt.checkpoint.folders import folder_at
from megagpt.checkpoint.load import newest_valid, whole_tensors
from megagpt.checkpoint.save import save
from tests.checkpoint.test_faults import damage, holds
from tests.checkpoint.tiny import header, run_with_commits, state


def run(*words: object) -> int:
    return cli.main(["checkpoint", *map(str, words)])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    run_with_commits(tmp_path / "checkpoints", (10, 20))
    return tmp_path / "checkpoints"


def one(path: Path, step: int, rows: int = 6) -> Path:
    """A root with one commit, written by one rank."""
    folder = folder_at(path)
    place = lineage.commit_folder(folder, lineage.begin(folder, None), step)
    head = {**header(step), "tokens": 0, "run": config.to_toml(config.Run())}
    save(place, state(step, rows=rows), header=head, rank=0, ranks=1)
    return path


def test_ls_and_show_say_what_is_there(tmp_path, capsys):
    place = one(tmp_path / "a", 1234)
    assert run("ls", place) == 0
    assert "step     1,234" in capsys.readouterr().out
    assert run("show", place, "--json") == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == {"a": [6, 3], "b": [5]}


def test_verify_names_the_damaged_file_and_says_so_in_its_exit_status(root, capsys):
    assert run("verify", root) == 0
    assert capsys.readouterr().out.count("undamaged, 2 of 2 tensors whole") == 2
    damage(root / "gen-0002" / "step-000000020" / "rank-00001.safetensors", "flip", random.Random(3))
    assert run("verify", root) == 1
    assert "rank-00001.safetensors has changed" in capsys.readouterr().out


def test_diff_finds_equal_what_was_cut_otherwise_and_names_what_differs_most(root, tmp_path, capsys):
    newest = root / "gen-0002" / "step-000000020"
    assert run("reshard", root, "--to", tmp_path / "cut", "--files", 3) == 0
    assert len(list((tmp_path / "cut").rglob("*.safetensors"))) == 3
    assert holds(newest_valid(folder_at(tmp_path / "cut"))[0], 20)
    assert run("diff", newest, tmp_path / "cut") == 0
    assert "6 of 6 tensors are bitwise equal" in capsys.readouterr().out
    assert run("diff", newest, root / "gen-0001" / "step-000000010") == 1
    printed = capsys.readouterr().out
    assert "0 of 6" in printed
    assert printed.splitlines()[1].split()[0].startswith("exp_avg_sq/")
    assert "largest difference 3.000e+01" in printed


def test_average_is_the_mean_of_the_weights(tmp_path):
    places = [one(tmp_path / str(step), step) for step in (10, 20, 60)]
    assert run("average", *places, "--out", tmp_path / "mean") == 0
    manifest, _ = newest_valid(folder_at(tmp_path / "mean" / "checkpoints"))
    assert manifest is not None
    for kind, name, value in whole_tensors(manifest):
        expected = {part.name: part.weight for part in state(30)}[name]
        assert torch.equal(value, expected if kind == "weight" else torch.zeros_like(expected))


def test_each_kind_of_bad_input_gets_one_clear_error(root, tmp_path, capsys):
    assert run("show", tmp_path) == 2
    assert "is no checkpoint" in capsys.readouterr().err
    assert run("diff", one(tmp_path / "a", 1), one(tmp_path / "b", 1, rows=7)) == 2
    assert "a is [7, 3] there and [6, 3] in this run" in capsys.readouterr().err
    assert run("reshard", root, "--to", root) == 2
    assert "is not empty" in capsys.readouterr().err
    (root / "gen-0002" / "step-000000020" / "manifest.json").write_text('{"format_version": 9}')
    assert run("show", root) == 2
    assert "has format version 9, and this megagpt reads version 2" in capsys.readouterr().err
