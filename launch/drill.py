"""`megagpt launch drill`: rehearse a run's bad days before it has one.

The user's own preset, shrunk, is submitted to a throw-away SLURM on this machine, disturbed, and must end with the
losses of an undisturbed run, bit for bit. Each scene gives a verdict and its times: from the fault until it was
noticed, until the ranks were started again, and until the next new step.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megagpt
from megagpt import config
from megagpt.errors import UserError, did_you_mean
from megagpt.launch import faults, local_slurm, scenes
from megagpt.launch.rehearsal import Rehearsal, launch_of, submit
from megagpt.launch.scenes import SCENES, Scene
from megagpt.launch.shrink import VOCABULARY, shrink
from megagpt.launch.spec import Cluster, Launch, Retries

STEPS, EVERY, STRIKE_AFTER = 60, 10, 25
SIGNAL_SECONDS = 30
ALL = ("submit", *(scene.name for scene in SCENES), "bad_node")


@dataclass(frozen=True, kw_only=True)
class Drill:
    """Rehearse faults with a preset, shrunk, on a throw-away SLURM of this machine; needs root and its packages."""

    scenes: tuple[str, ...] = ALL
    """Which; the first, an undisturbed run, is always played."""
    steps: int = STEPS
    """Steps of each rehearsed run."""
    out: Path | None = None
    """Folder to keep the rehearsed runs in. Unset: they are deleted."""
    json: bool = False
    """Print the verdicts as JSON."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a scene."""

    scene: str
    passed: bool
    finding: str
    """What went wrong, or what was seen."""
    seconds: dict[str, float]
    """From submission or fault to the notice, the new start of ranks and the next new step; and the whole scene."""
    steps_repeated: int = 0


def run_drill(options: Drill, *, preset: str = "quickstart") -> int:
    """Play the scenes; 0 if all passed."""
    unknown = [name for name in options.scenes if name not in ALL]
    if unknown:
        raise UserError(
            f"no scene is called {unknown[0]}.{did_you_mean(unknown[0], ALL)}", f"There are {', '.join(ALL)}."
        )
    lacking = local_slurm.missing()
    if lacking:
        raise UserError(
            f"no SLURM can be brought up here: {lacking}.", "Install the packages, and run as root on Linux."
        )
    run = shrink(config.load(preset), steps=options.steps, every=EVERY)
    with tempfile.TemporaryDirectory(prefix="megagpt-drill-") as name:
        folder = options.out.absolute() if options.out else Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        run = with_corpora(run, folder)
        verdicts = play(run, folder, options.scenes, quiet=options.json)
    if options.json:
        print(json.dumps([dataclasses.asdict(verdict) for verdict in verdicts], indent=2))
    return int(not all(verdict.passed for verdict in verdicts))


def play(run: config.Run, folder: Path, names: Sequence[str], *, quiet: bool = False) -> list[Verdict]:
    """The verdicts on the scenes named, and on the undisturbed run before them."""
    folder.mkdir(parents=True, exist_ok=True)
    base = base_launch(folder)
    found: list[Verdict] = []

    def add(verdict: Verdict) -> None:
        found.append(verdict)
        if not quiet:
            print(_line(verdict), flush=True)

    try:
        with local_slurm.cluster() as slurm:
            reference, verdict = _undisturbed(slurm, run, base)
            add(verdict)
            for scene in SCENES:
                if scene.name in names and verdict.passed:
                    add(_guarded(slurm, scene.name, lambda scene=scene: _play(slurm, run, base, scene, reference)))
            if "bad_node" in names and verdict.passed:
                add(_guarded(slurm, "bad_node", lambda: _bad_node(slurm, run, base, reference)))
    finally:
        root = faults.ledger(base.cluster_name)
        for path in sorted(root.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        if root.is_dir():
            root.rmdir()
    return found


def base_launch(folder: Path) -> Launch:
    """What the launches of all scenes have in common."""
    return Launch(
        kind="slurm",
        name="drill",
        out=str(folder),
        folder=str(folder),
        command=(sys.executable,),
        nodes=1,
        gpus_per_node=1,
        devices=False,
        cluster=Cluster(time="10", spares=1, signal_seconds=SIGNAL_SECONDS),
        cluster_name=f"drill-{os.getpid()}",
        retries=Retries(back_off_seconds=1.0),
        source=str(Path(megagpt.__file__).absolute().parents[1]),
    )


def with_corpora(run: config.Run, folder: Path) -> config.Run:
    """The run on the demo's corpora, which are built in `folder` if they are not there yet."""
    from megagpt.commands.demo import build_corpora

    build_corpora(folder / "corpora", vocabulary=VOCABULARY)
    mixture = {str(folder / "corpora" / "prose"): 1, str(folder / "corpora" / "code"): 2}
    return dataclasses.replace(run, data=dataclasses.replace(run.data, mixture=mixture))


Losses = list[tuple[int, float, float]]


def _undisturbed(slurm: local_slurm.Cluster, run: config.Run, base: Launch) -> tuple[Losses, Verdict]:
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


def _guarded(slurm: local_slurm.Cluster, name: str, scene: Any) -> Verdict:
    """A scene that breaks down has failed; the others are still played."""
    began = time.time()
    try:
        return scene()
    except (TimeoutError, RuntimeError, OSError) as error:
        slurm.run("scancel", "--user=root", check=False)
        for number in range(1, slurm.shape.nodes + 1):
            slurm.repair(f"n{number}")
        slurm.resize_disk(full=False)
        return Verdict(scene=name, passed=False, finding=str(error), seconds={"scene": round(time.time() - began, 1)})


def _play(slurm: local_slurm.Cluster, run: config.Run, base: Launch, scene: Scene, reference: Losses) -> Verdict:
    began = time.time()
    scenes.readmit(slurm, base.cluster_name)
    out = slurm.disk / scene.name if scene.own_disk else Path(base.out) / scene.name
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
    done = len(rehearsal.steps())
    scene.mend(slurm, rehearsal, node)
    rehearsal.wait(
        lambda: len(rehearsal.attempts()) > 1 and (rehearsal.attempts()[1] / "start.json").exists(), "a restart"
    )
    restarted = rehearsal.start(rehearsal.attempts()[1])
    resumed = rehearsal.wait_for_step(done + 1)
    state = rehearsal.finish()
    first = rehearsal.outcomes()[0]
    wrong = _faults_found(rehearsal, scene, node, state, reference)
    seconds = {
        "noticed": first.time - struck,
        "restarted": restarted["time"] - struck,
        "next_step": resumed - struck,
        "scene": time.time() - began,
    }
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


def _bad_node(slurm: local_slurm.Cluster, run: config.Run, base: Launch, reference: Losses) -> Verdict:
    """A node behind a slow wire must be found by the preflight, before the first step, and named."""
    began = time.time()
    scenes.readmit(slurm, base.cluster_name)
    slurm.slow_wire("n2", scenes.SLOW_WIRE)
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


def _line(verdict: Verdict) -> str:
    times = ", ".join(f"{name.replace('_', ' ')} {value:.1f} s" for name, value in verdict.seconds.items())
    return f"{'ok' if verdict.passed else 'FAILED':<7}{verdict.scene:<12}{times}; {verdict.finding}"
