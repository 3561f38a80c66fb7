"""`megagpt launch drill`: rehearse a run's bad days before it has one.

The user's own preset, shrunk, is submitted to a SLURM, disturbed, and must end with the losses of an undisturbed run,
bit for bit. Each scene gives a verdict and its times. The SLURM is a throw-away one on this machine, or a real cluster
by its profile: there only what needs no machine to be broken is played.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import megagpt
from megagpt import config
from megagpt.errors import UserError, did_you_mean
from megagpt.launch import faults, local_slurm, submit, verdicts
from megagpt.launch.named_slurm import NamedCluster
from megagpt.launch.profiles import load_cluster
from megagpt.launch.rehearsal import Slurm
from megagpt.launch.scenes import ELSEWHERE, SCENES, Scene
from megagpt.launch.shrink import VOCABULARY, shrink
from megagpt.launch.spec import Cluster, Launch, Retries, interpreter
from megagpt.launch.verdicts import Verdict

STEPS, REAL_STEPS, EVERY = 60, 600, 10
SIGNAL_SECONDS = 30
ALL = ("submit", *(scene.name for scene in SCENES), "bad_node")
ANYWHERE = ("submit", *(scene.name for scene in ELSEWHERE))
LOCAL = "local"


@dataclass(frozen=True, kw_only=True)
class Drill:
    """Rehearse faults with a preset, shrunk: on a throw-away SLURM of this machine (as root), or on a real cluster."""

    scenes: tuple[str, ...] = ()
    """Which; none named: all that the cluster allows. The first, an undisturbed run, is always played."""
    cluster: str = LOCAL
    """local: a throw-away SLURM. Else the profile, as for launch slurm, of the one that this machine submits to."""
    steps: int | None = None
    """Steps of each rehearsed run. Unset: 60, or 600 on a real cluster, where a blow takes seconds to be dealt."""
    out: Path | None = None
    """Folder to keep the rehearsed runs in; a real cluster needs one that all nodes see. Unset: they are deleted."""
    json: bool = False
    """Print the verdicts as JSON."""


def run_drill(options: Drill, *, preset: str = "quickstart") -> int:
    """Play the scenes; 0 if all passed. Raises UserError for what cannot be played."""
    usual = STEPS if options.cluster == LOCAL else REAL_STEPS
    run = shrink(config.load(preset), steps=options.steps or usual, every=EVERY)
    names = _chosen(options)
    with tempfile.TemporaryDirectory(prefix="megagpt-drill-") as name:
        folder = options.out.absolute() if options.out else Path(name)
        base = base_launch(folder) if options.cluster == LOCAL else _real_launch(options, folder)
        run = with_corpora(run, folder)
        if options.cluster == LOCAL:
            found = play(run, base, names, quiet=options.json)
        else:
            slurm = NamedCluster(base.source)
            found = _play_on(slurm, run, base, [one for one in ELSEWHERE if one.name in names], quiet=options.json)
    if options.json:
        print(json.dumps([dataclasses.asdict(verdict) for verdict in found], indent=2))
    return int(not all(verdict.passed for verdict in found))


def _chosen(options: Drill) -> tuple[str, ...]:
    """The scenes to play. Raises UserError for those that do not exist or cannot be played, and without a SLURM."""
    possible = ALL if options.cluster == LOCAL else ANYWHERE
    for name in options.scenes:
        if name not in ALL:
            raise UserError(f"no scene is called {name}.{did_you_mean(name, ALL)}", f"There are {', '.join(ALL)}.")
        if name not in possible:
            raise UserError(
                f"the scene {name} breaks machines, and those of a real cluster are not ours.",
                "Play it on the throw-away one: --cluster local.",
            )
    lacking = local_slurm.missing() if options.cluster == LOCAL else ""
    if lacking:
        raise UserError(
            f"no SLURM can be brought up here: {lacking}.", "Install the packages, and run as root on Linux."
        )
    if not options.scenes and possible != ALL:
        left = ", ".join(name for name in ALL if name not in possible)
        print(f"megagpt: not played, since they break machines: {left}. --cluster local does.", file=sys.stderr)
    return options.scenes or possible


def play(run: config.Run, base: Launch, names: Sequence[str], *, quiet: bool = False) -> list[Verdict]:
    """The verdicts on the scenes named, and on the undisturbed run before them, on a throw-away cluster."""
    Path(base.out).mkdir(parents=True, exist_ok=True)
    with local_slurm.cluster() as slurm:
        played = [scene for scene in SCENES if scene.name in names]
        return _play_on(slurm, run, base, played, quiet=quiet, bad_node="bad_node" in names)


def _play_on(
    slurm: Slurm, run: config.Run, base: Launch, played: Sequence[Scene], *, quiet: bool, bad_node: bool = False
) -> list[Verdict]:
    found: list[Verdict] = []

    def add(verdict: Verdict) -> Verdict:
        found.append(verdict)
        if not quiet:
            print(_line(verdict), flush=True)
        return verdict

    try:
        reference, verdict = verdicts.undisturbed(slurm, run, base)
        if not add(verdict).passed:
            return found
        for scene in played:
            work = lambda scene=scene: verdicts.disturbed(slurm, run, base, scene, reference)  # noqa: E731
            add(verdicts.guarded(slurm, base, scene.name, work))
        if bad_node and isinstance(slurm, local_slurm.Cluster):
            add(verdicts.guarded(slurm, base, "bad_node", lambda: verdicts.bad_node(slurm, run, base, reference)))
    finally:
        faults.forget(faults.ledger(base.cluster_name))
    return found


def base_launch(folder: Path) -> Launch:
    """What the launches of all scenes on the throw-away cluster have in common."""
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


def _real_launch(options: Drill, folder: Path) -> Launch:
    """The same on a real cluster, as its profile says. Raises UserError for what can be refused before submission."""
    if options.out is None:
        raise UserError("a drill on a real cluster needs --out.", "Name a folder on a file system that all nodes see.")
    cluster = load_cluster(options.cluster)
    base = base_launch(folder)
    base = dataclasses.replace(
        base,
        command=(interpreter(cluster, "slurm"),),
        devices=cluster.gpus_per_node > 0,
        cluster=dataclasses.replace(cluster, time=base.cluster.time, spares=1, signal_seconds=SIGNAL_SECONDS),
    )
    submit.check_slurm(dataclasses.replace(base, nodes=2))
    return base


def with_corpora(run: config.Run, folder: Path) -> config.Run:
    """The run on the demo's corpora, which are built in `folder` if they are not there yet."""
    from megagpt.commands.demo import build_corpora

    build_corpora(folder / "corpora", vocabulary=VOCABULARY)
    mixture = {str(folder / "corpora" / "prose"): 1, str(folder / "corpora" / "code"): 2}
    return dataclasses.replace(run, data=dataclasses.replace(run.data, mixture=mixture))


def _line(verdict: Verdict) -> str:
    times = ", ".join(f"{name.replace('_', ' ')} {value:.1f} s" for name, value in verdict.seconds.items())
    return f"{'ok' if verdict.passed else 'FAILED':<7}{verdict.scene:<12}{times}; {verdict.finding}"
