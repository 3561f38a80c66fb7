"""SLURM as the supervisor needs it: the nodes of this job, its state, and how to leave and come again.

Standard library alone. Every answer of SLURM's commands is read here, and nowhere else in the supervisor.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ANSWER_SECONDS = 60.0
STEP_SECONDS = 1.0
_TASK = re.compile(r"error: ([\w.-]+): tasks? (\d+)[\d,-]*: (?!Terminated)(.*)")


def own_job() -> str:
    """The id of this job, as scontrol takes it."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def own_node() -> str:
    """The name that SLURM has for this node."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def nodes_of_job() -> list[str]:
    """The nodes of this allocation, in SLURM's order, which follows the topology where it knows one."""
    return asked("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()


def job_state(job: str) -> str:
    """RUNNING, CANCELLED, ...; empty if SLURM does not answer."""
    found = re.search(r"\bJobState=(\w+)", asked("scontrol", "--oneliner", "show", "job", job))
    return found[1] if found else ""


def addresses(nodes: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Node -> where its slurmd listens."""
    port = re.search(r"^SlurmdPort\s*=\s*(\d+)", asked("scontrol", "show", "config"), re.MULTILINE)
    found: dict[str, tuple[str, int]] = {}
    for line in asked("scontrol", "--oneliner", "show", "node", ",".join(nodes)).splitlines():
        fields = dict(part.split("=", 1) for part in line.split() if "=" in part)
        if "NodeName" in fields:
            own = fields.get("Port", port[1] if port else "6818")
            found[fields["NodeName"]] = (fields.get("NodeAddr", fields["NodeName"]), int(own))
    return found


def answers(address: tuple[str, int], seconds: float = 1.0) -> bool:
    """Whether a slurmd accepts connections: without one, nothing can be started on its node."""
    try:
        with socket.create_connection(address, timeout=seconds):
            return True
    except OSError:
        return False


def first_failed_task(log: Path) -> tuple[int, str, str] | None:
    """The rank, node and end of the first task that srun complained of."""
    with contextlib.suppress(OSError):
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            found = _TASK.search(line)
            if found:
                return int(found[2]), found[1], found[3]
    return None


def end_step(process: subprocess.Popen[bytes], job: str, steps: set[str]) -> None:
    """Kill a step's tasks wherever they can be reached, and its srun, which would wait for lost nodes."""
    words = ["scancel", "--signal=KILL"]
    cancels = [subprocess.Popen([*words, f"{job}.{step}"], stderr=subprocess.DEVNULL) for step in sorted(steps)]  # noqa: S603
    process.terminate()
    until = time.monotonic() + STEP_SECONDS
    for waiting in (process, *cancels):  # each waits for nodes that do not answer
        try:
            waiting.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            waiting.kill()
            waiting.wait()


def come_again(job: str, script: Path, excluded: Mapping[str, str], seconds: float = 60.0) -> str:
    """Give the nodes back and come again: by a requeue, or by a new job where nodes must be left out.

    Returns the new job's id. A requeue ends this process, by SLURM; if SLURM refuses it, a new job is submitted too.
    """
    if not excluded or "_" in job:
        refused = subprocess.run(["scontrol", "requeue", job], capture_output=True, timeout=ANSWER_SECONDS)  # noqa: S603, S607
        if not refused.returncode:
            time.sleep(seconds)
            return job
    without = [f"--exclude={','.join(sorted(excluded))}"] if excluded else []
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
    clean.update({name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ})
    command = ["sbatch", "--parsable", f"--dependency=afterany:{job}", *without, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, env=clean, check=True)  # noqa: S603
    return done.stdout.strip().split(";")[0]


def asked(*command: str) -> str:
    """What a command of SLURM's answers; empty if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS)  # noqa: S603
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip() if not done.returncode else ""
