"""What a fault costs a launched run, on a throw-away SLURM of this machine: every scene of the drill, and many stops.

    scenes   megagpt launch drill with the quickstart preset, shrunk: from the fault to its notice, to the new start of
             the ranks, to the next new step
    stops    one run that is told again and again, by the signal that SLURM sends before a time limit, to save and
             come back: how many of the saves were of the last step that was done, and how long each took

    python benchmarks/launch_drill.py [--stops 10] [--out benchmarks/results/launch_drill.json]

Needs root and Debian's slurm-wlm, munge and iproute2. The ranks of all virtual nodes share this machine's cores, so
the start of a process weighs more here than on a cluster, and the network less.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megagpt import config
from megagpt.launch import local_slurm, local_slurm_conf
from megagpt.launch.drill import ALL, EVERY, STEPS, base_launch, play, with_corpora
from megagpt.launch.rehearsal import launch_of, submit
from megagpt.launch.shrink import shrink


def stops(run: config.Run, folder: Path, count: int) -> dict[str, Any]:
    """Stop and continue one run `count` times; what was saved, and how soon."""
    saved, seconds = 0, []
    base = base_launch(folder)
    retries = dataclasses.replace(base.retries, requeues=count + 1)
    with local_slurm.cluster() as slurm:
        launch = launch_of(run, folder / "stops", base=dataclasses.replace(base, retries=retries))
        rehearsal = submit(slurm, launch, run)
        for stop in range(count):
            done = len(rehearsal.steps())
            rehearsal.wait(lambda done=done: len(rehearsal.steps()) > done + 2, "progress")
            told = time.time()
            slurm.run("scancel", "--signal=USR1", "--batch", rehearsal.jobs[-1])
            rehearsal.wait(lambda stop=stop: len(rehearsal.outcomes()) > stop, "the outcome")
            ended = rehearsal.outcomes()[stop]
            saved += ended.cause == "time_limit" and ended.step == len(rehearsal.steps())
            seconds.append(round(ended.time - told, 2))
            rehearsal.wait(lambda stop=stop: len(rehearsal.attempts()) > stop + 1, "the next attempt")
        slurm.run("scancel", rehearsal.jobs[-1])
    return {"asked": count, "saved_the_last_step": saved, "seconds_to_saved": seconds}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megagpt-drill-") as name:
        folder = Path(name)
        load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
        run = with_corpora(shrink(config.load("quickstart"), steps=STEPS, every=EVERY), folder)
        verdicts = play(run, folder, ALL)
        endless = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=100_000, tokens=10**9))
        found = {
            "what": "faults of a launched run on a throw-away SLURM of 4 virtual nodes",
            "command": " ".join(sys.argv),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": f"{platform.machine()}, {cores} cores, Python {platform.python_version()}",
            "slurm": ".".join(map(str, local_slurm_conf.version())),
            "load_before": round(load, 1),
            "scenes": [dataclasses.asdict(verdict) for verdict in verdicts],
            "stops": stops(endless, folder, options.stops),
        }
    print(json.dumps(found["stops"], indent=1))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(not all(verdict.passed for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
