"""What ranks leave on disk about themselves while they run, for each other and for whoever comes after they died.

    attempts/0002/beat-00003.json    a rank's Beat: who and where it is, and its times; rewritten every second or so
    attempts/0002/stacks-00003.txt   the Python stacks of its threads, if it found itself hanging

The last beat of a rank that was killed says when it was alive for the last time, and in which phase.
"""

from __future__ import annotations

import dataclasses
import json
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
    saves: int
    repeats_first: bool
    """The attempt's first step had been done before."""
    median_step: float
    seconds: dict[str, float]
    """By phase; they add up to beat - began."""


def write_beat(folder: Path, beat: Beat) -> None:
    """Replace the rank's file, whole; not synced to disk, since it is out of date in a second."""
    path = folder / f"beat-{beat.rank:05d}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(dataclasses.asdict(beat)), encoding="utf-8")
    temporary.replace(path)


def read_beats(folder: Path) -> list[Beat]:
    """The last beat of every rank of an attempt, by rank."""
    return [beat for path in sorted(folder.glob("beat-?????.json")) if (beat := _read(path)) is not None]


def put_aside(folder: Path) -> None:
    """Keep rank 0's last beat of an earlier attempt that had the same folder, as where a launcher gives none."""
    earlier = _read(folder / "beat-00000.json")
    if earlier is not None:
        (folder / "beat-00000.json").replace(folder / f"beat-00000-{earlier.began:.0f}.json")


def first_rank_beats(out: Path) -> list[Beat]:
    """The last beat of rank 0 in every attempt at the run in `out`, in order."""
    found = (_read(path) for path in (out / FOLDER).glob("*/beat-00000*.json"))
    return sorted((beat for beat in found if beat is not None), key=lambda beat: beat.began)


def _read(path: Path) -> Beat | None:
    """None if it is not there, or was torn by a power cut."""
    try:
        return Beat(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
