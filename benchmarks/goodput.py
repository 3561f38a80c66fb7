"""Goodput of a run that fails at random, beside what Young's and Daly's model expects of its own numbers.

    simulated  thousands of failures in simulated time. Only time is made up: each attempt drives a real Clock
               (megagpt/heal/clock.py) through its phases and leaves rank 0's beat on disk, and the real accounting
               reads them (megagpt/heal/goodput.py), as it does for `megagpt report`
    cluster    a run on a throw-away SLURM of this machine, whose ranks are killed at random moments; the same
               accounting. A few minutes hold a few failures, so chance alone moves its numbers by some per cent

Both print the share of time in steps that count, the share that is expected, and the difference.

    python benchmarks/goodput.py [--parts simulated cluster] [--seconds 200] [--out benchmarks/results/goodput.json]

The second part needs root and Debian's slurm-wlm, munge and iproute2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megagpt import config, stop
from megagpt.heal.attempts import Beat, write_beat
from megagpt.heal.clock import Clock, Phase
from megagpt.heal.goodput import Goodput, goodput
from megagpt.launch import faults, local_slurm
from megagpt.launch.drill import base_launch, with_corpora
from megagpt.launch.rehearsal import launch_of, submit
from megagpt.launch.shrink import shrink
from megagpt.launch.spec import Retries

PARTS = ("simulated", "cluster")
SAVE_EVERY = 20
"""Steps between two saves on the cluster."""
MTBF_SECONDS = 40.0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What is simulated; all in seconds but `every`, the steps between two saves."""

    step: float
    every: int
    save: float
    notice: float
    """From a failure to the next attempt's command."""
    start: float
    """From the command to the first step."""
    compile: float
    """What the first step takes beyond another."""
    mtbf: float


class _Failed(Exception):
    """The machine failed."""


class SimulatedClock(Clock):
    """A rank's clock whose time is what it is told."""

    def __init__(self, began: float, fails: float) -> None:
        super().__init__(began)
        self.moment, self.fails = began, fails
        self.last_beat = began, self.seconds(), self.mark()

    def now(self) -> float:
        return self.moment

    def spend(self, phase: Phase, step: int, seconds: float) -> None:
        """Be in a phase for so long, with a beat each second. Raises _Failed if the machine fails meanwhile."""
        self.enter(phase, step)
        self.idle(seconds)

    def idle(self, seconds: float) -> None:
        end = min(self.moment + seconds, self.fails)
        while self.last_beat[0] + 1.0 <= end:
            self.moment = max(self.moment, self.last_beat[0] + 1.0)
            self.last_beat = self.moment, self.seconds(), self.mark()
        self.moment = end
        if end == self.fails:
            raise _Failed


def simulate(out: Path, machine: Machine, *, failures: int, seed: int = 0) -> None:
    """Leave in `out` what a run leaves whose machine fails so often, at random moments."""
    rng, began, committed, reached = random.Random(seed), 0.0, 0, 0
    fails = rng.expovariate(1 / machine.mtbf)
    for attempt in range(failures + 1):
        clock = SimulatedClock(began, fails if attempt < failures else float("inf"))
        clock.reached, step, ended = reached, committed, ""
        steps = step + machine.every if attempt == failures else sys.maxsize
        try:
            clock.idle(machine.start)
            while step < steps:
                kind = clock.computing(step + 1)
                clock.spend(kind, step + 1, machine.step + (machine.compile if kind == "compile" else 0.0))
                step += 1
                reached = max(reached, step)
                if step % machine.every == 0:
                    clock.spend("save", step, machine.save)
                    committed = step
            ended = "finished"
            clock.enter("end", step)
            clock.last_beat = clock.moment, clock.seconds(), clock.mark()
        except _Failed:
            began = fails + machine.notice
            while fails <= began:  # what fails while nobody is there hits nobody
                fails += rng.expovariate(1 / machine.mtbf)
        folder = out / "attempts" / f"{attempt + 1:06d}"
        folder.mkdir(parents=True)
        write_beat(folder, _beat(clock, ended))


def _beat(clock: SimulatedClock, ended: str) -> Beat:
    """The last one that was written."""
    moment, seconds, mark = clock.last_beat
    return Beat(
        rank=0,
        host="n1",
        began=clock.began,
        beat=moment,
        phase=mark.phase,
        step=mark.step,
        since=mark.since,
        place="",
        waiting=False,
        hanging=False,
        ended=ended,
        saves=clock.saves,
        repeats_first=clock.repeats_first,
        median_step=clock.median_step(),
        seconds=seconds,
    )


def simulated(folder: Path) -> list[dict[str, Any]]:
    """Machines with cheap and dear saves, short and long restarts."""
    machines = (
        Machine(step=5.0, every=60, save=10.0, notice=5.0, start=60.0, compile=20.0, mtbf=10_000.0),
        Machine(step=5.0, every=24, save=10.0, notice=5.0, start=60.0, compile=20.0, mtbf=1000.0),
        Machine(step=1.0, every=30, save=5.0, notice=5.0, start=30.0, compile=5.0, mtbf=100.0),
    )
    found = []
    for number, machine in enumerate(machines):
        out = folder / f"machine-{number}"
        simulate(out, machine, failures=3000)
        split = goodput(out, mtbf_hours=0)
        assert split is not None
        found.append({"machine": dataclasses.asdict(machine), **told(split)})
    return found


def on_cluster(folder: Path, seconds: float, seed: int = 1) -> dict[str, Any]:
    """Kill a rank of a real run at random moments, for so many seconds."""
    run = with_corpora(shrink(config.load("quickstart"), steps=1_000_000, every=SAVE_EVERY), folder)
    base = base_launch(folder)
    endless = Retries(inside=10**6, without_progress=10**6, back_off_seconds=0.0)
    launch = launch_of(run, folder / "goodput", base=dataclasses.replace(base, retries=endless))
    rng, struck = random.Random(seed), 0
    with local_slurm.cluster() as slurm:
        rehearsal = submit(slurm, launch, run)
        rehearsal.wait_for_step(1)
        moment = began = time.time()
        while (moment := moment + rng.expovariate(1 / MTBF_SECONDS)) < began + seconds:
            time.sleep(max(0.0, moment - time.time()))
            struck += slurm.signal_ranks(rehearsal.jobs[-1], rng.choice(rehearsal.nodes()), signal.SIGKILL)
            faults.forget(faults.ledger(launch.cluster_name))  # else the second death on a node would shut it out
        time.sleep(max(0.0, began + seconds - time.time()))
        done = rehearsal.done()
        rehearsal.wait(lambda: rehearsal.done() > done, "a step after the last failure")
        stop.ask(rehearsal.out)
        rehearsal.finish()
        split, steps = goodput(rehearsal.out, mtbf_hours=0), rehearsal.done()
    faults.forget(faults.ledger(launch.cluster_name))
    assert split is not None
    return {"seed": seed, "killed": struck, "steps": steps, **told(split)}


def told(split: Goodput) -> dict[str, Any]:
    """The split, the expectation and their difference."""
    assert split.predicted is not None
    return {
        "measured_share": round(split.comparable, 4),
        "expected_share": round(split.predicted.share, 4),
        "difference": round(split.comparable / split.predicted.share - 1, 4),
        "wall_seconds": round(split.wall, 1),
        "attempts": split.attempts,
        "seconds": {kind: round(value, 1) for kind, value in split.seconds.items() if value},
        "expected_of": {
            name: round(value, 3) for name, value in dataclasses.asdict(split.predicted).items() if name != "share"
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {
        "what": "share of time in steps that count, beside the share that Daly's model expects",
        "command": " ".join(sys.argv),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}",
        "load_before": round(os.getloadavg()[0], 1),
    }
    with tempfile.TemporaryDirectory(prefix="megagpt-goodput-") as name:
        if "simulated" in options.parts:
            found["simulated"] = simulated(Path(name))
        if "cluster" in options.parts:
            found["cluster"] = on_cluster(Path(name), options.seconds)
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
