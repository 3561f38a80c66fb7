"""A throw-away cluster as its users see it: SLURM's commands on PATH, as on a login node, and a profile."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megagpt.launch import local_slurm

COMMANDS = ("sbatch", "squeue", "sinfo", "scontrol", "scancel", "srun")
LACKING = local_slurm.missing()
needs_slurm = pytest.mark.skipif(bool(LACKING), reason=f"no SLURM can be brought up here: {LACKING}")


@dataclass(frozen=True)
class Login:
    """What a test has of the cluster."""

    slurm: local_slurm.Cluster
    folder: Path
    """Seen by all nodes."""
    profile: Path
    inside: dict[str, str]
    """The environment of a command that is inside already."""

    offer: Callable[..., None]
    """Have a command of that name on PATH that runs inside, with some words before its others."""

    def run(self, *command: str, check: bool = True) -> str:
        """What a command prints inside."""
        return self.slurm.run(*command, check=check, env=self.inside)

    def wait_for_queue(self) -> None:
        """Return once no job is left in it."""
        while self.run("squeue", "--noheader"):
            time.sleep(0.2)


@contextlib.contextmanager
def login(folder: Path) -> Iterator[Login]:
    """Bring a cluster up, with its commands before all others on PATH, and a home of its own."""
    with local_slurm.cluster() as slurm, pytest.MonkeyPatch.context() as patch:
        (folder / "bin").mkdir(parents=True)
        environment = slurm.env()
        path = shlex.quote(environment["PATH"])

        def offer(name: str, *words: str) -> None:
            inside = shlex.join([*slurm.command(shutil.which(name) or name), *words])
            (folder / "bin" / name).write_text(f'#!/bin/sh\nPATH={path} exec {inside} "$@"\n')
            (folder / "bin" / name).chmod(0o755)

        for name in COMMANDS:
            offer(name)
        patch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
        patch.setenv("SLURM_CONF", str(slurm.folder / "slurm.conf"))
        patch.setenv("HOME", str(folder))
        patch.delenv("TRITON_INTERPRET", raising=False)
        profile = folder / "rehearsal.toml"
        profile.write_text(f'shared = ["{folder}"]\ntime = "10"\nsignal_seconds = 30\nexclusive = false\n')
        yield Login(slurm, folder, profile, environment, offer)
