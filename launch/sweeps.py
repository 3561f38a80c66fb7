"""A sweep's folder: launch/sweep.sh is its job array, and each of its other folders is a run, a task of the array."""

from __future__ import annotations

from pathlib import Path

from megagpt.report.metrics import read_records

SCRIPT = "sweep.sh"


def is_sweep(out: Path) -> bool:
    """Whether `out` is the folder of a whole sweep."""
    return (out / "launch" / SCRIPT).is_file()


def runs_of(sweep: Path) -> list[Path]:
    """The folders of the runs that were submitted, in the order of the array."""
    found = [path.parents[1] for path in sweep.glob("*/launch/jobs.jsonl")]
    return sorted(found, key=place_of)


def newest_job(run: Path) -> str:
    """The task of an array that a run was last submitted as: 4711_3."""
    return read_records(run / "launch" / "jobs.jsonl")[-1]["job"]


def place_of(run: Path) -> int:
    """The run's index in the array."""
    return int(newest_job(run).partition("_")[2] or 0)
