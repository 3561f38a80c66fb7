"""Play a scene of a drill on a cluster, and judge what became of the run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megagpt import config
from megagpt.heal.attempts import first_rank_beats
from megagpt.launch import faults, local_slurm
from megagpt.launch.rehearsal import Rehearsal, Slurm, launch_of, submit
from megagpt.launch.scenes import SLOW_WIRE, Scene
from megagpt.launch.spec import Launch

STRIKE_AFTER = 15
Losses = list[tuple[int, float, float]]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a scene."""

    scene: str
    passed: bool
    finding: str
    """What went wrong, or what was seen."""
    seconds: dict[str, float]
    """Of the whole scene; and from submission or fault until it was noticed, the next attempt began, its srun was
    started (ranks), a rank had its interpreter (python) and its checkpoint (loaded), and a new step was done.
    """
    steps_repeated: int = 0


def undisturbed(slurm: Slurm, run: config.Run, base: Launch) -> tuple[Losses, Verdict]:
    """The losses that every disturbed run must have as well."""
    began = time.time()
    rehearsal = submit(slurm, launch_of(run, Path(base.out) / "submit", base=base), run)
    rehearsal.wait(rehearsal.attempts, "the first attempt")
    started = time.time()
    stepped = rehearsal.wait_for_step(1)
    state = rehearsal.finish()
    losses = rehearsal.losses()
    passed = state == "COMPLETED" and [step for step, *_ in losses] == list(range(1, config.steps_of(run) + 1))
    seconds = {"supervisor": started - began, "first_step": stepped - began, "scene": time.time() - began}
    finding = f"{len(losses)} steps" if passed else f"the job is {state}: {_last_word(rehearsal)}"
    return losses, Verdict(scene="submit", passed=passed, finding=finding, seconds=_rounded(seconds))


def guarded(slurm: Slurm, base: Launch, name: str, scene: Callable[[], Verdict]) -> Verdict:
    """Play a scene with all nodes in service. One that breaks down has failed; the others are still played."""
    began = time.time()
    try:
        readmit(slurm, base.cluster_name)
        return scene()
    except (TimeoutError, RuntimeError, OSError) as error:
        slurm.run("scancel", f"--name=drill-{name}-{os.getpid()}", check=False)
        return Verdict(scene=name, passed=False, finding=str(error), seconds={"scene": round(time.time() - began, 1)})


def disturbed(slurm: Slurm, run: config.Run, base: Launch, scene: Scene, reference: Losses) -> Verdict:
    """A run with a fault in it, which must end as the undisturbed one did."""
    began = time.time()
    out = Path(base.out) / scene.name
    if scene.own_disk and isinstance(slurm, local_slurm.Cluster):
        out = slurm.disk / scene.name
    rehearsal = submit(slurm, launch_of(run, out, base=base), run)
    rehearsal.wait_for_step(STRIKE_AFTER)
    node = rehearsal.nodes()[0 if scene.batch_node else -1]
    struck = time.time()
    scene.strike(slurm, rehearsal, node)
    if scene.own_disk:
        rehearsal.wait(
            lambda: list(rehearsal.out.glob("attempts/0001/logs/*")) and _ended_ranks(rehearsal), "the full disk"
        )
    else:
        rehearsal.wait(lambda: rehearsal.outcomes() or len(rehearsal.attempts()) > 1, "the end of the attempt")
    done = rehearsal.done()
    scene.mend(slurm, rehearsal, node)
    rehearsal.wait(
        lambda: len(rehearsal.attempts()) > 1 and (rehearsal.attempts()[1] / "start.json").exists(), "a restart"
    )
    restarted = rehearsal.start(rehearsal.attempts()[1])
    resumed = rehearsal.wait_for_step(done + 1)
    state = rehearsal.finish()
    first = rehearsal.outcomes()[0]
    wrong = _faults_found(rehearsal, scene, node, state, reference)
    again = first_rank_beats(rehearsal.out)[1]
    moments = {
        "noticed": first.time,
        "restarted": restarted["time"],
        "ranks": (rehearsal.attempts()[1] / "nodes").stat().st_mtime,
        "python": again.began,
        "loaded": again.began + again.seconds["start"],
        "next_step": resumed,
    }
    seconds = {**{name: moment - struck for name, moment in moments.items()}, "scene": time.time() - began}
    return Verdict(
        scene=scene.name,
        passed=not wrong,
        finding="; ".join(wrong) or f"{first.cause.replace('_', ' ')}, then bit for bit",
        seconds=_rounded(seconds),
        steps_repeated=max(0, done - max(restarted["commits"], 0)),
    )


def _ended_ranks(rehearsal: Rehearsal) -> bool:
    return "waiting for room" in _last_word(rehearsal) or bool(rehearsal.outcomes())


def _faults_found(rehearsal: Rehearsal, scene: Scene, node: str, state: str, reference: Losses) -> list[str]:
    """What is not as it must be after a scene."""
    wrong = []
    first = rehearsal.outcomes()[0]
    jobs = [rehearsal.start(attempt)["job"] for attempt in rehearsal.attempts()]
    if state != "COMPLETED":
        wrong.append(f"the job is {state}: {_last_word(rehearsal)}")
    if first.cause != scene.cause:
        wrong.append(f"the attempt ended by {first.cause}, not {scene.cause}: {first.message}")
    if (jobs[0] == jobs[1]) != scene.same_job:
        wrong.append(f"it went on in {jobs[1]}, having been in {jobs[0]}")
    if rehearsal.losses() != reference:
        wrong.append("losses differ from the undisturbed run's")
    if scene.leaves_node and any(node in rehearsal.start(attempt)["nodes"] for attempt in rehearsal.attempts()[1:]):
        wrong.append(f"{node} was used again")
    return wrong


def bad_node(slurm: local_slurm.Cluster, run: config.Run, base: Launch, reference: Losses) -> Verdict:
    """A node behind a slow wire must be found by the preflight, before the first step, and named."""
    began = time.time()
    slurm.slow_wire("n2", SLOW_WIRE)
    rehearsal = submit(slurm, launch_of(run, Path(base.out) / "bad_node", base=base), run)
    stepped = rehearsal.wait_for_step(1)
    nodes, state = rehearsal.nodes(), rehearsal.finish()
    known = faults.excluded(faults.ledger(base.cluster_name))
    wrong = [] if state == "COMPLETED" else [f"the job is {state}: {_last_word(rehearsal)}"]
    wrong += [] if "n2" in known else ["the preflight did not find n2"]
    wrong += [] if rehearsal.losses() == reference else ["losses differ from the undisturbed run's"]
    finding = "; ".join(wrong) or f"left out before the first step: {known['n2']}"
    seconds = {"first_step": stepped - began, "scene": time.time() - began}
    return Verdict(scene="bad_node", passed=not wrong and nodes != [], finding=finding, seconds=_rounded(seconds))


def _last_word(rehearsal: Rehearsal) -> str:
    logs = sorted((rehearsal.out / "launch").glob("slurm-*.out"))
    lines = logs[-1].read_text().strip().splitlines() if logs else []
    return lines[-1] if lines else "no log"


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in seconds.items()}


def readmit(slurm: Slurm, name: str) -> None:
    """Forget the faults of a rehearsal's nodes, and have all nodes back in service."""
    for path in faults.ledger(name).glob("*/*.json"):
        path.unlink()
    slurm.recover()
