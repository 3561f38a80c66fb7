"""What ranks leave on disk about themselves while they run, for each other and for whoever comes after they died.

    attempts/0002/rank-00003.json    a rank's Beat: who and where it is, and its times; rewritten every second or so
    attempts/0002/rank-00003.stacks  the Python stacks of its threads, if it found itself hanging

The last beat of a rank that was killed says when it was alive for the last time, and in which phase.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = "attempts"


@dataclass(frozen=True, kw_only=True)
class Beat:
    """A rank's sign of life. Times are in seconds, moments in seconds since 1970."""

    rank: int
    host: str
    began: float
    """When the attempt's command did."""
    beat: float
    """When this was written."""
    phase: str
    step: int
    since: float
    """When the rank entered this phase of this step."""
    place: str
    """Where the training thread is: the innermost line of ours, and what it called there."""
    waiting: bool
    """It is inside a collective, or in another wait for other ranks."""
    hanging: bool
    ended: str
    """How the attempt ended, as far as this rank knows: empty while it runs, and if it was killed."""
    reached: int
    """The furthest step done so far."""
    saves: int
    compiled: int
    """Steps in the phase `compile`."""
    median_step: float
    seconds: dict[str, float]
    """By phase; they add up to beat - began."""


def next_attempt(out: Path) -> int:
    """The number of an attempt that begins now, from 1; one process asks, and tells the others."""
    return max((int(path.name) for path in _folders(out)), default=0) + 1


def attempt_folder(out: Path, number: int) -> Path:
    return out / FOLDER / f"{number:04d}"


def write_beat(folder: Path, beat: Beat) -> None:
    """Replace the rank's file, whole; not synced to disk, since it is out of date in a second."""
    path = folder / f"rank-{beat.rank:05d}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(dataclasses.asdict(beat)), encoding="utf-8")
    temporary.replace(path)


def read_beats(folder: Path) -> list[Beat]:
    """The last beat of every rank of an attempt, by rank."""
    return [beat for path in sorted(folder.glob("rank-*.json")) if (beat := _read(path)) is not None]


def first_rank_beats(out: Path) -> Iterator[Beat]:
    """The last beat of rank 0 in every attempt, in order."""
    for folder in _folders(out):
        beat = _read(folder / "rank-00000.json")
        if beat is not None:
            yield beat


def _folders(out: Path) -> list[Path]:
    return sorted(path for path in (out / FOLDER).glob("[0-9]*") if path.is_dir() and path.name.isdecimal())


def _read(path: Path) -> Beat | None:
    """None if it is not there, or was torn by a power cut."""
    try:
        return Beat(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
