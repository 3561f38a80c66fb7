"""Damage of any kind to any file is found, and a save that dies at any system call leaves a valid newest commit."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megagpt.checkpoint import lineage
from megagpt.checkpoint.folders import folder_at
from megagpt.checkpoint.load import Manifest, load, load_checked, newest_valid
from megagpt.errors import UserError
from tests.checkpoint.tiny import counting_bytes, equal, run_with_commits, save_on_two_ranks, state

TRIALS = 600
FILES = ("manifest.json", "rank-00000.safetensors", "rank-00001.safetensors", "start.json")


def holds(manifest: Manifest | None, step: int) -> bool:
    """Whether the checkpoint's values are those of `step`, bit for bit."""
    assert manifest is not None
    found = state(0)
    load(manifest, found)
    return equal(found, state(step))


def damage(path: Path, kind: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)


def test_every_flip_truncation_and_loss_in_every_kind_of_file_is_found_named_and_survived(tmp_path):
    pristine, root = tmp_path / "pristine", tmp_path / "trial"
    run_with_commits(pristine, (10, 20, 30))
    shutil.copytree(pristine, root)
    rng = random.Random(0)
    for trial in range(TRIALS):
        shutil.copytree(pristine / "gen-0002", root / "gen-0002", dirs_exist_ok=True)
        name = FILES[trial % len(FILES)]
        kind = rng.choice(["flip", "flip", "flip", "truncated", "missing", "empty"])
        place = root / "gen-0002" if name == "start.json" else root / "gen-0002" / "step-000000030"
        damage(place / name, kind, rng)
        if name == "start.json":  # needed only where the attempt's own commits are gone
            shutil.rmtree(place / "step-000000030")
        found = state(0)
        manifest, faults = newest_valid(
            folder_at(root), read=lambda manifest, found=found: load_checked(manifest, found)
        )
        if name == "start.json" and kind == "missing":
            assert manifest is not None  # an attempt that never began, as far as its folder tells
        else:
            assert any(name in fault for fault in faults), (trial, name, kind, faults)
        assert holds(manifest, 20), (trial, name, kind)
        assert equal(found, state(20)), "what was read of the damaged one has been read over"


def test_damage_to_the_only_checkpoint_refuses_the_run(tmp_path):
    root = folder_at(tmp_path)
    save_on_two_ranks(lineage.commit_folder(root, lineage.begin(root, None), 10), 10)
    damage(tmp_path / "gen-0001" / "step-000000010" / "rank-00001.safetensors", "flip", random.Random(1))
    with pytest.raises(UserError, match="rank-00001.safetensors has changed since it was written"):
        newest_valid(root)


def test_a_rank_reads_each_byte_of_its_share_of_the_files_once(tmp_path):
    root = run_with_commits(tmp_path, (10, 20))
    manifest, _ = newest_valid(root)
    assert manifest is not None
    found = state(0)
    with counting_bytes(root) as read:
        assert load_checked(manifest, found) is None
    assert equal(found, state(20))
    assert read == {part["file"]: part["bytes"] for part in manifest.header["files"]}


class Crash(BaseException):
    """The process has died: nothing after it runs on the disk either."""


CALLS = (
    "open", "write", "fsync", "close", "replace", "rename", "link", "unlink", "mkdir", "rmdir", "listdir", "stat",
)  # fmt: skip


@pytest.fixture
def crash_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Have the system call number n, and every later one, raise; half of what that call writes may reach the disk."""
    left = [0]
    real = {name: getattr(os, name) for name in CALLS}

    def faulty(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if left[0] == 1 and name == "write":
                real["write"](arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            left[0] -= 1
            if left[0] <= 0 and name != "close":  # a dead process' files are closed
                raise Crash
            return real[name](*arguments, **options)

        return call

    def arm(calls: int) -> None:
        left[0] = calls
        for name in CALLS:
            monkeypatch.setattr(os, name, faulty(name))

    yield arm
    monkeypatch.undo()


def test_a_save_that_dies_at_any_system_call_leaves_the_newest_commit_valid(tmp_path, monkeypatch, crash_after):
    pristine = tmp_path / "pristine"
    run_with_commits(pristine, (10, 20))
    outcomes = []
    for calls in range(1, 10_000):
        root = tmp_path / f"trial-{calls}"
        shutil.copytree(pristine, root)
        crash_after(calls)
        try:
            folder = folder_at(root)
            save_on_two_ranks(lineage.commit_folder(folder, 2, 30), 30)
            lineage.retain(folder, keep=1)
            died = False
        except Crash:
            died = True
        monkeypatch.undo()
        manifest, _ = newest_valid(folder_at(root))
        assert manifest is not None
        step = manifest.commit.step
        assert step in (20, 30)
        assert holds(manifest, step), calls
        generation = lineage.begin(folder_at(root), manifest.commit)
        save_on_two_ranks(lineage.commit_folder(folder_at(root), generation, 30), 30)  # what remains is not in the way
        lineage.retain(folder_at(root), keep=1)
        assert holds(newest_valid(folder_at(root))[0], 30)
        shutil.rmtree(root)
        outcomes.append(step)
        if not died:
            break
    assert len(outcomes) > 60
    assert outcomes == sorted(outcomes), "once the commit has happened, nothing undoes it"
    assert {20, 30} == set(outcomes)
