"""The scenes of a drill: what is done to a running rehearsal, and what must have become of it."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megagpt.launch.local_slurm import Cluster
from megagpt.launch.rehearsal import Rehearsal, Slurm
from megagpt.outcome import Cause

SLOW_WIRE, CRAWL = "40mbit", "4mbit"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One fault."""

    name: str
    cause: Cause
    """What the disturbed attempt must have ended by."""
    strike: Callable[[Any, Rehearsal, str], None]
    """Do it on the throw-away cluster, to the node of the last rank."""
    mend: Callable[[Any, Rehearsal, str], None] = lambda *_: None
    """Undo it, once the attempt has ended."""
    elsewhere: Callable[[Slurm, Rehearsal, str], None] | None = None
    """Do it on a cluster whose machines are not ours to break; None: it cannot be done there."""
    leaves_node: bool = False
    """The run must go on without that node."""
    same_job: bool = True
    """It goes on inside its allocation; else it comes back through the queue."""
    own_disk: bool = False
    """Run on the disk of the cluster, which can be made full."""
    batch_node: bool = False
    """Strike the node of the batch script, the first, instead of the last rank's."""


def _kill(slurm: Slurm, rehearsal: Rehearsal, node: str) -> None:
    slurm.signal_ranks(rehearsal.jobs[-1], node, signal.SIGKILL)


def _stop_process(slurm: Slurm, rehearsal: Rehearsal, node: str) -> None:
    slurm.signal_ranks(rehearsal.jobs[-1], node, signal.SIGSTOP)


def _crash(cluster: Cluster, _: Rehearsal, node: str) -> None:
    cluster.crash(node)


def _pull(cluster: Cluster, _: Rehearsal, node: str) -> None:
    cluster.pull_cable(node)


def preempt(slurm: Slurm, nodes: Sequence[str]) -> None:
    """Have a more urgent job take `nodes` for a second."""
    words = ["--partition=urgent", f"--nodelist={','.join(nodes)}", "--exclusive", "--time=1", "--output=/dev/null"]
    slurm.run("sbatch", *words, "--wrap=sleep 1")


def _preempt(cluster: Cluster, rehearsal: Rehearsal, _: str) -> None:
    preempt(cluster, rehearsal.nodes())


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


def _announce_preemption(slurm: Slurm, rehearsal: Rehearsal, _: str) -> None:
    """The signals that SLURM sends before it takes nodes away, and nobody who takes them."""
    slurm.run("scancel", "--signal=TERM", rehearsal.jobs[-1])
    slurm.run("scancel", "--signal=TERM", "--batch", rehearsal.jobs[-1])


def _announce_limit(slurm: Slurm, rehearsal: Rehearsal, _: str) -> None:
    """The signal that SLURM sends before a time limit."""
    slurm.run("scancel", "--signal=USR1", "--batch", rehearsal.jobs[-1])


def _requeue(slurm: Slurm, rehearsal: Rehearsal, _: str) -> None:
    slurm.run("scontrol", "requeue", rehearsal.jobs[-1])


SCENES = (
    Scene(name="rank_kill", cause="rank_lost", strike=_kill, elsewhere=_kill),
    Scene(name="hang", cause="hang", strike=_stop_process, elsewhere=_stop_process),
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
    Scene(name="preemption", cause="preempted", strike=_preempt, elsewhere=_announce_preemption, same_job=False),
    Scene(
        name="time_limit",
        cause="time_limit",
        strike=_shorten,
        mend=_lengthen,
        elsewhere=_announce_limit,
        same_job=False,
    ),
    Scene(name="requeue", cause="preempted", strike=_requeue, elsewhere=_requeue, same_job=False),
    Scene(
        name="full_disk",
        cause="disk_full",
        strike=lambda cluster, *_: cluster.resize_disk(full=True),
        mend=lambda cluster, *_: cluster.resize_disk(full=False),
        own_disk=True,
    ),
)


ELSEWHERE = tuple(
    dataclasses.replace(scene, strike=scene.elsewhere, mend=lambda *_: None)
    for scene in SCENES
    if scene.elsewhere is not None
)
"""What can be rehearsed on a cluster whose machines are not ours to break."""
