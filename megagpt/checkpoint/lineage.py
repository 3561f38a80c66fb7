"""Which checkpoint a run continues from: generations, so that a late writer of an old attempt can do no harm.

    checkpoints/gen-0001/start.json              an attempt, and the commit that it began with
    checkpoints/gen-0001/step-000000060/...      its commits
    checkpoints/gen-0002/start.json              the next attempt: {"parent": {"generation": 1, "step": 60}}

An attempt takes its number by creating start.json exclusively. A reader takes the newest commit of the highest
generation, else goes to that generation's parent and looks there from the parent's step downwards, and so on. Whatever
a rank of an old attempt commits after a newer attempt has begun lies above its parent's step, so nobody ever reads it:
no lock, no clock, and no `latest` file that could move backwards.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megagpt.files import sync_folder

MANIFEST = "manifest.json"
START = "start.json"


@dataclass(frozen=True, order=True)
class Commit:
    """A complete checkpoint, by place."""

    generation: int
    step: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.folder}"


def commits(root: Path) -> Iterator[Commit]:
    """The commits that the newest attempt descends from, newest first."""
    generation, limit = max(_generations(root), default=0), None
    while generation:
        folder = root / _generation_name(generation)
        for step in sorted(_steps(folder), reverse=True):
            if limit is None or step <= limit:
                yield Commit(generation, step, folder / _step_name(step))
        parent = json.loads((folder / START).read_text())["parent"]
        generation, limit = (parent["generation"], parent["step"]) if parent else (0, None)


def begin(root: Path, parent: Commit | None) -> int:
    """Start a new attempt that continues from `parent`, or from the initial weights; returns its generation."""
    root.mkdir(parents=True, exist_ok=True)
    content = {"parent": {"generation": parent.generation, "step": parent.step} if parent else None}
    generation = max(_generations(root), default=0)
    while True:
        generation += 1
        folder = root / _generation_name(generation)
        folder.mkdir(exist_ok=True)
        temporary = folder / f".{START}.{os.getpid()}"
        temporary.write_text(json.dumps(content))
        try:
            os.link(temporary, folder / START)  # fails if it exists: of two attempts one takes the number, whole
        except FileExistsError:
            continue
        finally:
            temporary.unlink()
        sync_folder(folder)
        sync_folder(root)
        return generation


def commit_folder(root: Path, generation: int, step: int) -> Path:
    """Where attempt `generation` saves `step`."""
    return root / _generation_name(generation) / _step_name(step)


def retain(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` commits of the lineage (at least one), and what interrupted saves left."""
    kept = list(commits(root))[: max(1, keep)]
    newest = kept[0] if kept else None
    for generation in _generations(root):
        for folder in (root / _generation_name(generation)).glob("step-*"):
            later = newest is None or (generation, int(folder.name[5:])) > (newest.generation, newest.step)
            if not later and folder not in [commit.folder for commit in kept]:
                (folder / MANIFEST).unlink(missing_ok=True)  # first: a half-deleted checkpoint is no checkpoint
                shutil.rmtree(folder)


def _generation_name(generation: int) -> str:
    return f"gen-{generation:04d}"


def _step_name(step: int) -> str:
    return f"step-{step:09d}"


def _generations(root: Path) -> list[int]:
    return [int(path.parent.name[4:]) for path in root.glob(f"gen-*/{START}")]


def _steps(folder: Path) -> list[int]:
    return [int(path.parent.name[5:]) for path in folder.glob(f"step-*/{MANIFEST}")]
