from __future__ import annotations

import json
from pathlib import Path

from megagpt.checkpoint.lineage import MANIFEST, begin, commit_folder, commits, retain


def commit(root: Path, generation: int, step: int) -> None:
    folder = commit_folder(root, generation, step)
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text("{}")


def steps(root: Path) -> list[tuple[int, int]]:
    return [(commit.generation, commit.step) for commit in commits(root)]


def test_a_new_attempt_continues_the_line_of_its_parent(tmp_path):
    first = begin(tmp_path, None)
    commit(tmp_path, first, 10)
    commit(tmp_path, first, 20)
    second = begin(tmp_path, next(commits(tmp_path)))
    commit(tmp_path, second, 30)
    assert (first, second) == (1, 2)
    assert steps(tmp_path) == [(2, 30), (1, 20), (1, 10)]


def test_what_an_old_attempt_commits_after_a_newer_began_is_never_read(tmp_path):
    first = begin(tmp_path, None)
    commit(tmp_path, first, 10)
    second = begin(tmp_path, next(commits(tmp_path)))
    commit(tmp_path, first, 40)  # the zombie
    assert steps(tmp_path) == [(1, 10)]
    commit(tmp_path, second, 20)
    assert steps(tmp_path) == [(2, 20), (1, 10)]


def test_an_attempt_that_began_from_nothing_hides_all_before_it(tmp_path):
    commit(tmp_path, begin(tmp_path, None), 10)
    begin(tmp_path, None)
    assert steps(tmp_path) == []


def test_of_two_attempts_at_once_each_gets_a_number_of_its_own(tmp_path):
    first = begin(tmp_path, None)
    (tmp_path / "gen-0002").mkdir()
    (tmp_path / "gen-0002" / "start.json").write_text(json.dumps({"parent": None}))
    assert (first, begin(tmp_path, None)) == (1, 3)


def test_retention_keeps_the_newest_and_never_touches_what_is_being_written(tmp_path):
    generation = begin(tmp_path, None)
    for step in (10, 20, 30):
        commit(tmp_path, generation, step)
    unfinished = [commit_folder(tmp_path, generation, step) for step in (25, 40)]
    for folder in unfinished:
        folder.mkdir()
    retain(tmp_path, 2)
    assert steps(tmp_path) == [(1, 30), (1, 20)]
    assert [folder.exists() for folder in unfinished] == [False, True]


def test_retention_keeps_at_least_one(tmp_path):
    commit(tmp_path, begin(tmp_path, None), 10)
    retain(tmp_path, 0)
    assert steps(tmp_path) == [(1, 10)]
