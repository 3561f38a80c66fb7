"""A real SLURM cluster to rehearse on, as its users have it: nothing but the drill's own jobs is touched."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megagpt.launch.submit import clean_environment

ANSWER_SECONDS, PATIENCE_SECONDS = 120.0, 3600.0


@dataclass(frozen=True)
class NamedCluster:
    """The cluster whose commands are on PATH."""

    source: str
    """Folder that holds this package, as the nodes see it."""
    patience_seconds: float = PATIENCE_SECONDS

    def run(self, *command: str, check: bool = True) -> str:
        """What a command of SLURM's prints. Raises RuntimeError if it refuses."""
        environment = {**clean_environment(os.environ), "PYTHONPATH": self.source}
        done = subprocess.run(  # noqa: S603 - ours
            command, capture_output=True, text=True, timeout=ANSWER_SECONDS, env=environment, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def outside(self, path: Path) -> Path:
        """The same: the nodes share this machine's folders."""
        return path

    def signal_ranks(self, job: str, node: str, number: int) -> int:
        """Send a signal to the ranks of `job` on the node; how many there were."""
        step = ["srun", f"--jobid={job}", "--overlap", "--quiet", "--nodes=1", "--ntasks=1", "--mem=0"]
        strike = [sys.executable, "-m", "megagpt.launch.strike", job, str(int(number))]
        return int(self.run(*step, f"--nodelist={node}", *strike))

    def recover(self) -> None:
        """Nothing was broken."""
