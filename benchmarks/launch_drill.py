"""What a fault costs a launched run, on a throw-away SLURM of this machine: every scene of the drill, and many stops.

    scenes   megagpt launch drill with the quickstart preset, shrunk: from the fault to its notice, to the new start of
             the ranks, to the next new step
    stops    three runs of the same seed at once, on two nodes each, that come back to be stopped again: one by jobs
             that preempt it, two by time limits that are cut to a minute or two, whose signal SLURM sends at its own
             look at the clock, every half minute. All at random moments. How many stops saved the last step that was
             done before the grace time was over, how long they took, and whether all runs have the same losses

    python benchmarks/launch_drill.py [--parts scenes stops] [--stops 50] [--out benchmarks/results/launch_drill.json]

A part that is not played keeps its place in the file. Needs root and Debian's slurm-wlm, munge and iproute2. The ranks
of all virtual nodes share this machine's cores, so the start of a process weighs more here than on a cluster, and the
network less.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megagpt import config, stop
from megagpt.launch import local_slurm, local_slurm_conf
from megagpt.launch.drill import ALL, EVERY, STEPS, base_launch, play, with_corpora
from megagpt.launch.history import newest_commit
from megagpt.launch.refusals import time_seconds
from megagpt.launch.rehearsal import Rehearsal, launch_of, submit
from megagpt.launch.scenes import preempt
from megagpt.launch.shrink import shrink
from megagpt.outcome import Cause

PARTS = ("scenes", "stops")
LONG = "60"
"""Minutes of a limit that is not to be met."""
MOST_WAIT_SECONDS = 4.0
"""Between the first new step and the word to stop."""
WARNING_SECONDS = 90
"""Before the limit, SLURM's signal is due; as it looks twice a minute, it comes at its next look after the cut."""
GRACE_SECONDS = 30.0
"""For a preempted job, by the cluster's settings; for the others at least, between the signal and the limit."""


@dataclasses.dataclass
class Stops:
    """The stops of one run by one cause."""

    cause: Cause
    asked: int = 0
    saved_in_time: int = 0
    seconds: list[float] = dataclasses.field(default_factory=list)
    """From the preempting job, or from SLURM's signal, to the end of all ranks."""


def stops(run: config.Run, folder: Path, count: int) -> dict[str, Any]:
    """Stop and continue three runs, `count` times in all."""
    base = base_launch(folder)
    cluster = dataclasses.replace(base.cluster, spares=0, time=LONG, signal_seconds=WARNING_SECONDS)
    base = dataclasses.replace(base, retries=dataclasses.replace(base.retries, requeues=count), cluster=cluster)
    times: dict[str, tuple[Cause, int]] = {
        "preempted": ("preempted", count // 2),
        "limited": ("time_limit", (count - count // 2 + 1) // 2),
        "limited_too": ("time_limit", (count - count // 2) // 2),
    }
    with local_slurm.cluster(local_slurm.Shape(nodes=6, grace_seconds=int(GRACE_SECONDS))) as slurm:
        runs = {name: submit(slurm, launch_of(run, folder / name, base=base), run) for name in times}
        with ThreadPoolExecutor() as pool:
            each = [pool.submit(_stop, runs[name], Stops(cause), number) for name, (cause, number) in times.items()]
            found = [dataclasses.asdict(one.result()) for one in each]
        losses = [one.losses() for one in runs.values()]
    common = min(map(len, losses))
    return {
        "grace_seconds": GRACE_SECONDS,
        "runs": found,
        "steps_in_common": common,
        "losses_equal_bit_for_bit": common > 0 and all(one[:common] == losses[0][:common] for one in losses),
    }


def _stop(rehearsal: Rehearsal, found: Stops, count: int) -> Stops:
    """Stop a run `count` times, and leave it stopped."""
    rng = random.Random(rehearsal.out.name)
    while found.asked < count:
        number, done = len(rehearsal.outcomes()), rehearsal.done()

        def over(number: int = number) -> bool:
            return len(rehearsal.outcomes()) > number

        rehearsal.wait(lambda done=done: rehearsal.done() > done, "progress")
        time.sleep(rng.uniform(0.0, MOST_WAIT_SECONDS))
        if found.cause == "preempted":
            told = time.time()
            preempt(rehearsal.slurm, rehearsal.nodes())
        else:
            _limit(rehearsal, str(int(_run_seconds(rehearsal)) // 60 + 2))
            while not stop.asked(rehearsal.out) and not over():
                time.sleep(0.01)  # the file lives for as long as the stop takes
            told = time.time()
        rehearsal.wait(over, "the outcome")
        ended, steps = rehearsal.outcomes()[number], rehearsal.done()
        found.asked += 1
        found.seconds.append(round(ended.time - told, 2))
        saved = ended.cause == found.cause and ended.step == steps == newest_commit(rehearsal.out)
        found.saved_in_time += saved and ended.time - told < GRACE_SECONDS
        print(f"{found.cause} {found.asked}: {ended}, {ended.time - told:.2f} s", file=sys.stderr, flush=True)
        if found.cause == "time_limit":
            rehearsal.wait(lambda: rehearsal.state() == "PENDING", "the requeue")
            _limit(rehearsal, LONG)
    rehearsal.slurm.run("scancel", rehearsal.jobs[-1])
    return found


def _limit(rehearsal: Rehearsal, minutes: str) -> None:
    rehearsal.slurm.run("scontrol", "update", f"JobId={rehearsal.jobs[-1]}", f"TimeLimit={minutes}")


def _run_seconds(rehearsal: Rehearsal) -> float:
    """How long the job has run, as SLURM counts it."""
    return time_seconds(rehearsal.slurm.run("squeue", "--noheader", "--format=%M", f"--jobs={rehearsal.jobs[-1]}"))


def scenes(run: config.Run, folder: Path) -> dict[str, Any]:
    """Every scene of the drill."""
    return {"verdicts": [dataclasses.asdict(verdict) for verdict in play(run, base_launch(folder), ALL)]}


def _passed(part: str, found: dict[str, Any]) -> bool:
    if part == "scenes":
        return all(verdict["passed"] for verdict in found["verdicts"])
    return found["losses_equal_bit_for_bit"] and all(one["asked"] == one["saved_in_time"] for one in found["runs"])


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--stops", type=int, default=50)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    known = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    with tempfile.TemporaryDirectory(prefix="megagpt-drill-") as name:
        folder = Path(name)
        run = with_corpora(shrink(config.load("quickstart"), steps=STEPS, every=EVERY), folder)
        endless = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=1_000_000, tokens=10**9))
        play_part = {"scenes": lambda: scenes(run, folder), "stops": lambda: stops(endless, folder, options.stops)}
        for part in options.parts:
            stamp = {
                "command": " ".join(sys.argv),
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "load_before": round(os.getloadavg()[0], 1),
            }
            known[part] = {**stamp, **play_part[part]()}
    found = {
        "what": "faults of a launched run on a throw-away SLURM of 4 virtual nodes",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}",
        "slurm": ".".join(map(str, local_slurm_conf.version())),
        **{part: known[part] for part in PARTS if part in known},
    }
    print(json.dumps({part: found[part] for part in options.parts}, indent=1))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(not all(_passed(part, found[part]) for part in options.parts))


if __name__ == "__main__":
    sys.exit(main())
