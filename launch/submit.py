"""Write a launch beside its run, show what changed since the last one, and hand it to SLURM, Kubernetes or ssh."""

from __future__ import annotations

import difflib
import getpass
import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from megagpt.errors import UserError
from megagpt.files import write_whole
from megagpt.launch import hostfile, refusals
from megagpt.launch.spec import Launch

OTHER_JOB = ("SLURM_", "SBATCH_", "SRUN_", "PMI")
OTHER_RANK = frozenset({"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"})


def differences(files: Mapping[Path, str]) -> str:
    """What would change in files that exist already, as a unified diff; empty if nothing was ever submitted."""
    changed = []
    for path, text in files.items():
        if path.is_file():
            was = path.read_text(encoding="utf-8")
            changed += difflib.unified_diff(
                was.splitlines(), text.splitlines(), f"{path} (last submitted)", f"{path} (now)", lineterm=""
            )
    return "\n".join(changed)


def write_files(files: Mapping[Path, str]) -> None:
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)


def check_slurm(launch: Launch) -> None:
    """Everything that can be refused before sbatch. Raises UserError."""
    refusals.check_image(launch.cluster)
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch on this machine.", "Submit from a login node, or see the script with --dry-run."
        )
    refusals.check_shared(launch, Path("/proc/mounts").read_text(encoding="utf-8"))
    refusals.check_partition(launch, refusals.partitions(_asked(["sinfo", "--noheader", "--format=%P|%l|%D"])))
    enforced = "associations" in _line_of(_asked(["scontrol", "show", "config"]), "AccountingStorageEnforce")
    if enforced and not launch.cluster.account:
        user = getpass.getuser()
        default = _asked(["sacctmgr", "-nP", "show", "user", user, "format=DefaultAccount"])
        refusals.check_account(launch.cluster, enforced=True, default=default.strip())


def submit_slurm(script: Path, *, chain: int = 0, options: tuple[str, ...] = ()) -> list[str]:
    """Try the script with sbatch --test-only, then submit it and `chain` jobs that wait for it; returns their ids.

    The jobs inherit this environment, secrets with it, but nothing of a job that this may run inside of.
    """
    environment = clean_environment(os.environ)
    _asked(["sbatch", "--test-only", str(script)], environment)
    jobs: list[str] = []
    for _ in range(chain + 1):
        after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        answer = _asked(["sbatch", "--parsable", *options, *after, str(script)], environment)
        jobs.append(answer.strip().splitlines()[-1].split(";")[0])
    return jobs


def submit_kubernetes(manifest: Path) -> str:
    """Apply the manifest with kubectl; returns what it said."""
    if shutil.which("kubectl") is None:
        raise UserError("there is no kubectl on this machine.", f"Apply {manifest} where there is one.")
    return _asked(["kubectl", "apply", "--filename", str(manifest)]).strip()


def run_here(launch: Launch, script: Path) -> int:
    """Run torchrun's or the local script, or the hostfile's connections, to the end; returns the exit status."""
    if launch.kind == "hostfile":
        return hostfile.run(launch)
    return subprocess.run(["/bin/bash", str(script)], env=clean_environment(os.environ), check=False).returncode  # noqa: S603


def record(launch: Launch, job: str) -> None:
    """Note a submission beside the run."""
    line = json.dumps({"time": round(time.time(), 3), "kind": launch.kind, "job": job, "nodes": launch.nodes})
    with (launch.launch_folder() / "jobs.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what another job or rank, in which this may run, left in it."""
    return {
        name: value
        for name, value in environment.items()
        if name == "SLURM_CONF" or (not name.startswith(OTHER_JOB) and name not in OTHER_RANK)
    }


def _asked(command: list[str], environment: dict[str, str] | None = None) -> str:
    """What a cluster's command printed. Raises UserError with its own words if it failed."""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)  # noqa: S603
    except FileNotFoundError as error:
        raise UserError(f"there is no {command[0]} on this machine.") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{command[0]} did not answer in 120 s.", "Ask again when the cluster's controller is up."
        ) from error
    if done.returncode:
        words = " ".join(done.stderr.strip().splitlines()[-2:]) or f"exit status {done.returncode}"
        raise UserError(f"{' '.join(command[:2])} refused: {words}")
    return done.stdout


def _line_of(text: str, key: str) -> str:
    return next((line for line in text.splitlines() if line.strip().startswith(key)), "")
