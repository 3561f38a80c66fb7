"""Which checkpoint a run continues from: generations, so that a late writer of an old attempt can do no harm.

    checkpoints/gen-0001/start.json              an attempt, and the commit that it began with
    checkpoints/gen-0001/step-000000060/...      its commits
    checkpoints/gen-0002/start.json              the next attempt: {..., "parent": {"generation": 1, "step": 60}}

An attempt takes its number by creating start.json exclusively. A reader takes the newest commit of the highest
generation, else goes to that generation's parent and looks there from the parent's step downwards, and so on. Whatever
a rank of an old attempt commits after a newer attempt has begun lies above its parent's step, so nobody ever reads it:
no lock, no clock, and no `latest` file that could move backwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megagpt.checkpoint.folders import Folder, sealed, unsealed

MANIFEST = "manifest.json"
START = "start.json"


@dataclass(frozen=True, order=True)
class Commit:
    """A complete checkpoint, by place."""

    generation: int
    step: int
    folder: Folder = field(compare=False)

    def __str__(self) -> str:
        return f"{self.folder}"


@dataclass(frozen=True)
class Unusable:
    """A place where a commit or its ancestry should have been read, and could not."""

    fault: str


def commits(root: Folder) -> Iterator[Commit]:
    """The commits that the newest attempt descends from, newest first."""
    return (found for found in history(root) if isinstance(found, Commit))


def history(root: Folder) -> Iterator[Commit | Unusable]:
    """The same, with whatever on the way is incomplete or damaged."""
    for found in _line(root):
        if isinstance(found, Unusable):
            yield found
            continue
        generation, limit = found
        folder = root / _generation_name(generation)
        for step in sorted(_steps(folder), reverse=True):
            place = folder / _step_name(step)
            if limit is not None and step > limit:
                continue
            if place.exists(MANIFEST):
                yield Commit(generation, step, place)
            else:
                yield Unusable(f"{place}/{MANIFEST} is missing: its save was interrupted, or the file is lost")


def descends_from(root: Folder, generation: int, step: int) -> bool:
    """Whether the newest attempt comes after what `generation` had done at `step`, wherever that was kept.

    If `root` knows of no attempt at all, nothing speaks against it.
    """
    line = [found for found in _line(root) if not isinstance(found, Unusable)]
    return not line or any(number == generation and (limit is None or step <= limit) for number, limit in line)


def _line(root: Folder) -> Iterator[tuple[int, int | None] | Unusable]:
    """Generation and the last step of it that counts (None: all do), of the newest attempt and those it descends from.

    An attempt whose start.json is lost descends, as far as anyone can tell, from all that the one before it committed.
    """
    known = _generations(root)
    generation, limit = max(known, default=0), None
    while generation:
        yield generation, limit
        folder = root / _generation_name(generation)
        try:
            parent = unsealed(folder.read(START))["parent"]
            before, limit = (parent["generation"], parent["step"]) if parent else (0, None)
            if not 0 <= before < generation:
                raise ValueError(f"it continues from attempt {before}, which is no earlier one")
            generation = before
        except (OSError, ValueError, KeyError, TypeError) as error:
            if _steps(folder) or folder.exists(START):  # else the attempt never began
                yield Unusable(f"{folder}/{START} cannot be read: {error}")
            generation, limit = max((other for other in known if other < generation), default=0), None


def steps_in(root: Folder) -> list[tuple[int, int]]:
    """(generation, step) of all that is kept under `root`, complete or not, oldest first."""
    return [(number, step) for number in _generations(root) for step in _steps(root / _generation_name(number))]


def begin(root: Folder, parent: Commit | None) -> int:
    """Start a new attempt that continues from `parent`, or from the initial weights; returns its generation."""
    content: dict[str, Any] = {"parent": {"generation": parent.generation, "step": parent.step} if parent else None}
    generation = max(*_generations(root), parent.generation if parent else 0, 0) + 1
    while not (root / _generation_name(generation)).create(START, sealed(content)):
        generation += 1
    return generation


def commit_folder(root: Folder, generation: int, step: int) -> Folder:
    """Where attempt `generation` saves `step`."""
    return root / _generation_name(generation) / _step_name(step)


def retain(root: Folder, *, keep: int, always: set[int] | frozenset[int] = frozenset()) -> None:
    """Delete what interrupted saves left and all commits of the lineage but the newest `keep` (at least one) and those
    whose steps are in `always`. What is above the newest is left alone: it may be being written.
    """
    lineage = list(commits(root))
    kept = {(commit.generation, commit.step) for commit in lineage if commit.step in always}
    kept |= {(commit.generation, commit.step) for commit in lineage[: max(1, keep)]}
    newest = max(kept, default=(0, 0))
    for generation, step in steps_in(root):
        if (generation, step) < newest and (generation, step) not in kept:
            folder = commit_folder(root, generation, step)
            folder.delete_file(MANIFEST)  # first: a half-deleted one is no checkpoint
            folder.delete()


def _generation_name(generation: int) -> str:
    return f"gen-{generation:04d}"


def _step_name(step: int) -> str:
    return f"step-{step:09d}"


def _generations(root: Folder) -> list[int]:
    return _numbers(root, r"gen-(\d{4,})")


def _steps(folder: Folder) -> list[int]:
    return _numbers(folder, r"step-(\d{9,})")


def _numbers(folder: Folder, pattern: str) -> list[int]:
    return sorted(int(found.group(1)) for name in folder.names() if (found := re.fullmatch(pattern, name)))
