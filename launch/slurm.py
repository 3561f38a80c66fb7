"""SLURM batch scripts, as text: what a job asks for, and one line that hands over to the supervisor."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megagpt.launch.spec import Launch
from megagpt.launch.srun import gpus


def batch_script(launch: Launch, *, layout: str) -> str:
    """The script of one run; `layout` says in words how the ranks are cut."""
    spares = f" and {launch.cluster.spares} spare" if launch.cluster.spares else ""
    return "\n".join(
        [
            "#!/bin/bash",
            f"# megagpt: {launch.name}, {launch.world_size()} ranks = {layout}, on {launch.nodes} nodes{spares}.",
            *_directives(launch, log="slurm-%j.out"),
            *_preamble(launch),
            _supervise(launch, shlex.quote(str(launch.launch_folder() / "launch.json"))),
            "",
        ]
    )


def sweep_script(launches: Sequence[Launch], *, out: Path, layout: str) -> str:
    """One job array in the folder `out`, a task a run: launches that differ in their settings alone."""
    first = dataclasses.replace(launches[0], name=out.name, out=str(out))
    files = [f"    {shlex.quote(str(launch.launch_folder() / 'launch.json'))}" for launch in launches]
    return "\n".join(
        [
            "#!/bin/bash",
            f"# megagpt: a sweep of {len(launches)} runs, each of {first.world_size()} ranks = {layout}.",
            *_directives(first, log="slurm-%A_%a.out"),
            f"#SBATCH --array=0-{len(launches) - 1}",
            *_preamble(first),
            "launches=(",
            *files,
            ")",
            _supervise(first, '"${launches[$SLURM_ARRAY_TASK_ID]}"'),
            "",
        ]
    )


def data_script(launch: Launch, *, tasks: int) -> str:
    """A job array over the idempotent tasks of a corpus: each may be killed and run again, and bytes stay the same."""
    command = shlex.join(launch.command)
    return "\n".join(
        [
            "#!/bin/bash",
            f"# megagpt: tokenise {launch.out} in {tasks} tasks; any of them may run again.",
            *_directives(launch, log="data-%A_%a.out", run=False),
            f"#SBATCH --array=0-{tasks - 1}",
            *_preamble(launch),
            *(f"export {name}={shlex.quote(value)}" for name, value in launch.environment().items()),
            f'exec {command} --task "$SLURM_ARRAY_TASK_ID/{tasks}"',
            "",
        ]
    )


def _directives(launch: Launch, *, log: str, run: bool = True) -> list[str]:
    cluster = launch.cluster
    asked = {
        "job-name": launch.name,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "reservation": cluster.reservation,
        "constraint": cluster.constraint,
        "time": cluster.time,
        "nodes": str(launch.nodes_with_spares() if run else 1),
        "ntasks-per-node": str(launch.gpus_per_node if run else 1),
        "cpus-per-task": str(cluster.cpus_per_task or ""),
        "chdir": launch.folder,
        "output": str(launch.launch_folder() / log),
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{name}={_value(value)}" for name, value in asked.items() if value]
    if run:
        lines += [f"#SBATCH {gpus(launch)}"] if launch.devices else []
        lines += ["#SBATCH --exclusive"] if cluster.exclusive else []
        # Save before the limit; come back after preemption; outlive a lost node, so that the supervisor can go on.
        lines += [f"#SBATCH --signal=B:USR1@{cluster.signal_seconds}", "#SBATCH --requeue", "#SBATCH --no-kill"]
    return lines + [f"#SBATCH {option}" for option in cluster.sbatch]


def _value(text: str) -> str:
    """The value as sbatch reads it: quotes as in a shell, but nothing is expanded."""
    return text if shlex.quote(text.replace("%", "")) == text.replace("%", "") else f'"{text}"'


def _preamble(launch: Launch) -> list[str]:
    loads = [f"module load {shlex.quote(module)}" for module in launch.cluster.modules]
    return ["", "set -euo pipefail", *(["module purge", *loads] if loads else [])]


def _supervise(launch: Launch, file: str) -> str:
    """Outside any container: the interpreter that submits, which the batch node sees on the shared file system."""
    python = shlex.quote(str(Path(sys.executable)) if launch.cluster.container != "none" else launch.command[0])
    return f"exec env PYTHONPATH={shlex.quote(launch.source)} {python} -m megagpt.launch.supervise {file}"
