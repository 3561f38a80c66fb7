"""The shape of a throw-away SLURM cluster, and the files that tell SLURM of it (local_slurm.py)."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.77.0"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the cluster looks like."""

    nodes: int = 4
    gpus: int = 2
    """Pretended GPUs of each node: device files that hold nothing."""
    cpus: int = 4
    memory_mib: int = 32_000
    down_seconds: int = 10
    """After which a silent node counts as down; SLURM's default is 300."""
    requeue_seconds: int = 6
    """Before which a requeued job does not start again; SLURM's default is 120."""
    grace_seconds: int = 30
    """Between the word to a preempted job and its end."""


def configuration(folder: Path, shape: Shape) -> dict[str, str]:
    """SLURM's files, and the name services of the lab: reverse look-ups that nobody answers cost ranks 10 s each."""
    names = [f"n{number}" for number in range(1, shape.nodes + 1)]
    half = (shape.nodes + 1) // 2
    leaves = [names[:half], names[half:]] if shape.nodes > 1 else [names]
    switches = [f"SwitchName=leaf{place} Nodes={','.join(leaf)}" for place, leaf in enumerate(leaves, start=1)]
    spine = f"SwitchName=spine Switches={','.join(f'leaf{place + 1}' for place in range(len(leaves)))}"
    hosts = ["127.0.0.1 localhost", f"{NETWORK}.1 control"]
    hosts += [f"{NETWORK}.{10 + number} {name}" for number, name in enumerate(names, start=1)]
    return {
        "hosts": "\n".join(hosts) + "\n",
        "nsswitch.conf": "hosts: files\npasswd: files\ngroup: files\nservices: files\n",
        "resolv.conf": "",
        "slurm.conf": _slurm_conf(folder, shape, names),
        "gres.conf": f"NodeName={','.join(names)} Name=gpu File={folder}/dev/gpu[0-{shape.gpus - 1}]\n",
        "cgroup.conf": f"CgroupPlugin={'cgroup/v1' if version() < (23, 2) else 'disabled'}\n",
        "topology.conf": "\n".join([*switches, spine]) + "\n",
    }


def _slurm_conf(folder: Path, shape: Shape, names: list[str]) -> str:
    each = f"CPUs={shape.cpus} RealMemory={shape.memory_mib} Gres=gpu:{shape.gpus} State=UNKNOWN"
    settings = {
        "ClusterName": "rehearsal",
        "SlurmctldHost": f"control({NETWORK}.1)",
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthInfo": f"socket={folder}/munge.sock,cred_expire={shape.requeue_seconds}",
        "StateSaveLocation": f"{folder}/state",
        "SlurmdSpoolDir": f"{folder}/spool/%n",
        "SlurmctldPidFile": f"{folder}/pids/slurmctld",
        "SlurmdPidFile": f"{folder}/pids/%n",
        "SlurmctldLogFile": f"{folder}/log/slurmctld.log",
        "SlurmdLogFile": f"{folder}/log/slurmd.%n.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "MpiDefault": "none",
        "SwitchType": "switch/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU_Memory",
        "SlurmdParameters": "config_overrides",
        "DefMemPerCPU": "500",
        "GresTypes": "gpu",
        "TopologyPlugin": "topology/tree",
        "ReturnToService": "2",
        "SlurmdTimeout": str(shape.down_seconds),
        "MessageTimeout": "10",
        "TCPTimeout": "2",
        "InactiveLimit": "0",
        "KillWait": "5",
        "MinJobAge": "600",
        "JobRequeue": "1",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "bf_interval=1,sched_interval=2,sched_min_interval=10000,batch_sched_delay=0",
        "PropagateResourceLimits": "NONE",
        "MailProg": "/bin/true",
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    lines += [f"NodeName={name} NodeAddr={NETWORK}.{int(name[1:]) + 10} NodeHostname={name} {each}" for name in names]
    common = f"Nodes={','.join(names)} MaxTime=INFINITE DefaultTime=30 State=UP GraceTime={shape.grace_seconds}"
    lines += [f"PartitionName=main Default=YES PriorityTier=1 {common}"]
    lines += [f"PartitionName=urgent PriorityTier=10 {common}"]
    return "\n".join(lines) + "\n"


def version() -> tuple[int, ...]:
    """Of the SLURM that is installed: (22, 5)."""
    program = shutil.which("slurmd") or "/usr/sbin/slurmd"
    said = subprocess.run([program, "-V"], capture_output=True, text=True, check=True).stdout  # noqa: S603
    return tuple(int(part) for part in said.split()[-1].split(".")[:2])
