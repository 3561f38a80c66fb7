from __future__ import annotations

from pathlib import Path

import pytest

from megagpt.checkpoint import lineage
from megagpt.checkpoint.folders import folder_at, sealed
from megagpt.checkpoint.lineage import (
    MANIFEST,
    Commit,
    Unusable,
    begin,
    commit_folder,
    commits,
    descends_from,
    history,
    retain,
)


def commit(root: Path, generation: int, step: int) -> None:
    commit_folder(folder_at(root), generation, step).write(MANIFEST, [b"{}"])


def steps(root: Path) -> list[tuple[int, int]]:
    return [(commit.generation, commit.step) for commit in commits(folder_at(root))]


def test_a_new_attempt_continues_the_line_of_its_parent(tmp_path):
    first = begin(folder_at(tmp_path), None)
    commit(tmp_path, first, 10)
    commit(tmp_path, first, 20)
    second = begin(folder_at(tmp_path), next(commits(folder_at(tmp_path))))
    commit(tmp_path, second, 30)
    assert (first, second) == (1, 2)
    assert steps(tmp_path) == [(2, 30), (1, 20), (1, 10)]


def test_what_an_old_attempt_commits_after_a_newer_began_is_never_read(tmp_path):
    first = begin(folder_at(tmp_path), None)
    commit(tmp_path, first, 10)
    second = begin(folder_at(tmp_path), next(commits(folder_at(tmp_path))))
    commit(tmp_path, first, 40)  # the zombie
    assert steps(tmp_path) == [(1, 10)]
    commit(tmp_path, second, 20)
    assert steps(tmp_path) == [(2, 20), (1, 10)]


def test_what_the_newest_attempt_descends_from_ends_with_the_commit_that_it_began_from(tmp_path):
    root = folder_at(tmp_path)
    assert descends_from(root, 1, 5)  # nobody knows otherwise
    first = begin(root, None)
    commit(tmp_path, first, 10)
    second = begin(root, next(commits(root)))
    asked = [(first, 10), (first, 11), (second, 99), (second + 1, 5)]
    assert [descends_from(root, *each) for each in asked] == [True, False, True, False]


def test_an_attempt_that_began_from_nothing_hides_all_before_it(tmp_path):
    commit(tmp_path, begin(folder_at(tmp_path), None), 10)
    begin(folder_at(tmp_path), None)
    assert steps(tmp_path) == []


def test_of_two_attempts_at_once_each_gets_a_number_of_its_own(tmp_path, monkeypatch):
    root = folder_at(tmp_path)
    assert [begin(root, None), begin(root, None)] == [1, 2]
    monkeypatch.setattr(lineage, "_generations", lambda _root: [1])  # as of one that looked before the second began
    assert begin(root, None) == 3


def test_retention_keeps_the_newest_and_never_touches_what_is_being_written(tmp_path):
    generation = begin(folder_at(tmp_path), None)
    for step in (10, 20, 30):
        commit(tmp_path, generation, step)
    unfinished = [Path(str(commit_folder(folder_at(tmp_path), generation, step))) for step in (25, 40)]
    for folder in unfinished:
        folder.mkdir()
    retain(folder_at(tmp_path), keep=2)
    assert steps(tmp_path) == [(1, 30), (1, 20)]
    assert [folder.exists() for folder in unfinished] == [False, True]


def test_retention_keeps_at_least_one(tmp_path):
    generation = begin(folder_at(tmp_path), None)
    for step in (10, 20):
        commit(tmp_path, generation, step)
    retain(folder_at(tmp_path), keep=0)
    assert steps(tmp_path) == [(1, 20)]


def test_retention_keeps_the_steps_that_stay_for_ever(tmp_path):
    generation = begin(folder_at(tmp_path), None)
    for step in (10, 20, 30, 40):
        commit(tmp_path, generation, step)
    retain(folder_at(tmp_path), keep=1, always={20})
    assert steps(tmp_path) == [(1, 40), (1, 20)]


def test_a_commit_of_an_attempt_whose_start_is_lost_is_still_found(tmp_path):
    first = begin(folder_at(tmp_path), None)
    commit(tmp_path, first, 10)
    second = begin(folder_at(tmp_path), next(commits(folder_at(tmp_path))))
    commit(tmp_path, second, 20)
    (tmp_path / "gen-0002" / "start.json").unlink()
    assert steps(tmp_path) == [(2, 20), (1, 10)]
    assert [found.fault for found in history(folder_at(tmp_path)) if isinstance(found, Unusable)]


@pytest.mark.parametrize("parent", [1, 2, -1])
def test_an_attempt_that_claims_to_continue_from_no_earlier_one_ends_the_line(tmp_path, parent):
    start = sealed({"parent": {"generation": parent, "step": 10}})
    assert (folder_at(tmp_path) / "gen-0001").create("start.json", start)
    commit(tmp_path, 1, 10)
    found = list(history(folder_at(tmp_path)))
    assert [type(one) for one in found] == [Commit, Unusable]
