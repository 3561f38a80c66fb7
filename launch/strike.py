"""Signals to the ranks of one job on one node, and to nothing else: `python -m megagpt.launch.strike JOB SIGNAL`.

A drill on a real cluster runs it inside the job, by srun; on the throw-away one the lab calls it. Standard library
alone.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

RANK = b"megagpt.cli"


def ranks_of(job: str) -> list[int]:
    """The processes here that are ranks of `job`: tasks of a step of it, and neither its batch script nor its srun."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            variables = (folder / "environ").read_bytes().split(b"\0")
            own = f"SLURM_JOB_ID={job}".encode() in variables
            if own and any(one.startswith(b"SLURM_STEP_ID=") for one in variables):
                found += [int(folder.name)] if RANK in (folder / "cmdline").read_bytes() else []
    return found


def main(job: str, number: int) -> None:
    """Send the signal, and print how many ranks got it."""
    found = ranks_of(job)
    for process in found:
        os.kill(process, number)
    print(len(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
