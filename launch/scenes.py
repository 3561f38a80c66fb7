"""The scenes of a drill: what is done to a running rehearsal, and what must have become of it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from megagpt.launch import faults
from megagpt.launch.local_slurm import Cluster
from megagpt.launch.rehearsal import Rehearsal
from megagpt.outcome import Cause

SLOW_WIRE, CRAWL = "40mbit", "4mbit"
RANK = "megagpt.cli"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One fault."""

    name: str
    cause: Cause
    """What the disturbed attempt must have ended by."""
    strike: Callable[[Cluster, Rehearsal, str], None]
    """Do it, to the node of the last rank."""
    mend: Callable[[Cluster, Rehearsal, str], None] = lambda *_: None
    """Undo it, once the attempt has ended."""
    leaves_node: bool = False
    """The run must go on without that node."""
    same_job: bool = True
    """It goes on inside its allocation; else it comes back through the queue."""
    own_disk: bool = False
    """Run on the disk of the cluster, which can be made full."""
    batch_node: bool = False
    """Strike the node of the batch script, the first, instead of the last rank's."""


def _kill(cluster: Cluster, _: Rehearsal, node: str) -> None:
    cluster.kill(node, RANK)


def _stop_process(cluster: Cluster, _: Rehearsal, node: str) -> None:
    cluster.kill(node, RANK, signal.SIGSTOP)


def _crash(cluster: Cluster, _: Rehearsal, node: str) -> None:
    cluster.crash(node)


def _pull(cluster: Cluster, _: Rehearsal, node: str) -> None:
    cluster.pull_cable(node)


def _preempt(cluster: Cluster, _: Rehearsal, __: str) -> None:
    nodes = str(cluster.shape.nodes)
    words = [
        "--partition=urgent",
        f"--nodes={nodes}",
        "--exclusive",
        "--time=1",
        "--output=/dev/null",
        "--wrap=sleep 1",
    ]
    cluster.run("sbatch", *words)


def _shorten(cluster: Cluster, rehearsal: Rehearsal, _: str) -> None:
    """SLURM's shortest limit is a minute, and so small a run would be done before: its wires become slow."""
    for number in range(1, cluster.shape.nodes + 1):
        cluster.slow_wire(f"n{number}", CRAWL)
    cluster.run("scontrol", "update", f"JobId={rehearsal.jobs[-1]}", "TimeLimit=1")


def _lengthen(cluster: Cluster, rehearsal: Rehearsal, _: str) -> None:
    for number in range(1, cluster.shape.nodes + 1):
        cluster.slow_wire(f"n{number}", "")
    rehearsal.wait(lambda: rehearsal.state() == "PENDING", "the requeue")
    cluster.run("scontrol", "update", f"JobId={rehearsal.jobs[-1]}", "TimeLimit=10")


def _requeue(cluster: Cluster, rehearsal: Rehearsal, _: str) -> None:
    cluster.run("scontrol", "requeue", rehearsal.jobs[-1])


SCENES = (
    Scene(name="rank_kill", cause="rank_lost", strike=_kill),
    Scene(name="hang", cause="hang", strike=_stop_process),
    Scene(
        name="node_crash",
        cause="node",
        strike=_crash,
        mend=lambda cluster, _, node: cluster.boot(node),
        leaves_node=True,
    ),
    Scene(
        name="batch_crash",
        cause="node",
        strike=_crash,
        mend=lambda cluster, _, node: cluster.boot(node),
        leaves_node=True,
        same_job=False,
        batch_node=True,
    ),
    Scene(
        name="cable_pull",
        cause="node",
        strike=_pull,
        mend=lambda cluster, _, node: cluster.plug_in(node),
        leaves_node=True,
    ),
    Scene(name="preemption", cause="preempted", strike=_preempt, same_job=False),
    Scene(name="time_limit", cause="time_limit", strike=_shorten, mend=_lengthen, same_job=False),
    Scene(name="requeue", cause="preempted", strike=_requeue, same_job=False),
    Scene(
        name="full_disk",
        cause="disk_full",
        strike=lambda cluster, *_: cluster.resize_disk(full=True),
        mend=lambda cluster, *_: cluster.resize_disk(full=False),
        own_disk=True,
    ),
)


def readmit(cluster: Cluster, name: str) -> None:
    """Forget the faults of a rehearsal's nodes, and have all nodes back in service."""
    root = faults.ledger(name)
    for path in root.glob("*/*.json"):
        path.unlink()
    cluster.run("scontrol", "reconfigure")  # 22.05 miscounts GPUs after a job that lost a node was requeued
    deadline, states = time.monotonic() + 60.0, list[str]()
    while time.monotonic() < deadline:
        states = cluster.run("sinfo", "--noheader", "--Node", "--format=%t", "--partition=urgent").split()
        if states.count("idle") == cluster.shape.nodes:
            return
        time.sleep(0.2)
    raise TimeoutError(f"the nodes did not come back: {states}")
