"""The supervisor's side of the preflight: examine all nodes at once, for at most a minute, and name the unfit ones.

A node is unfit if it does not answer in time, if a check of its own fails, if its clock or versions differ from most
nodes', or if it is slow with most others. If only one pair is slow, its link is, and the end that is slower with third
parties goes. Standard library alone: the judging part of `preflight.py`, which runs on the nodes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import secrets
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megagpt.launch.spec import Launch
from megagpt.launch.srun import gpus, srun_command
from megagpt.parallel.launcher import TOKEN

WHOLE_SECONDS, QUICK_SECONDS = 60.0, 15.0
CLOCK_SECONDS = 2.0
SLOW = 0.35
"""Of the median of what each node reaches with its best peer."""


def unfit(launch: Launch, nodes: Sequence[str], folder: Path, *, whole: bool) -> dict[str, str]:
    """Node -> why it must not be used. With `whole`, versions, GPUs and bandwidths are examined too."""
    place = folder / "preflight"
    place.mkdir()
    python = launch.command[0]
    words = ["-m", "megagpt.launch.preflight", str(place), "--nodes", *nodes]
    words += ["--whole"] if whole else []
    words += [f"--gpus={launch.gpus_per_node}"] if launch.devices else []
    single = dataclasses.replace(launch, nodes=len(nodes), gpus_per_node=1, command=(python, *words))
    command = [
        gpus(launch) if part.startswith("--gpus-per-node") else part
        for part in srun_command(single, nodes=nodes, attempt=int(folder.name))
        if not part.startswith("--output")
    ]
    low, high = launch.cluster.ports
    environment = {
        **os.environ,
        **launch.environment(),
        TOKEN: secrets.token_hex(16),
        "MASTER_ADDR": nodes[0],
        "MASTER_PORT": str(random.SystemRandom().randint(low, high)),
    }
    with (folder / "logs" / "preflight.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - the launch's own command
            [command[0], "--overlap", *command[1:]], env=environment, stdout=log, stderr=log
        )
        seconds = WHOLE_SECONDS if whole else QUICK_SECONDS
        reports = _wait(process, place, nodes, seconds)
    return judge(reports, nodes, seconds=seconds)


def _wait(process: subprocess.Popen[bytes], place: Path, nodes: Sequence[str], seconds: float) -> dict[str, Any]:
    """The nodes' reports, once all are complete, the step has ended, or time is up."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        reports = read(place)
        if len(reports) == len(nodes) and all(report.get("complete") for report in reports.values()):
            break
        time.sleep(0.05)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1.0)
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2.0)
        process.kill()
        process.wait()
    return read(place)


def read(place: Path) -> dict[str, Any]:
    """Node -> its report."""
    found = {}
    for path in sorted(place.glob("[!.]*.json")):
        with contextlib.suppress(ValueError):
            found[path.stem] = json.loads(path.read_text())
    return found


def judge(reports: Mapping[str, Any], nodes: Sequence[str], *, seconds: float) -> dict[str, str]:
    """Node -> what is wrong with it."""
    bad = {node: f"no answer in {seconds:.0f} s" for node in nodes if node not in reports}
    clock = statistics.median([report["clock_ahead_seconds"] for report in reports.values()]) if reports else 0.0
    common = _most_common([report.get("versions") for report in reports.values()])
    for node, report in reports.items():
        wrong = [f"{check['name']}: {check['finding']}" for check in report["checks"] if check["status"] == "fail"]
        wrong += report.get("gpus", [])
        ahead = report["clock_ahead_seconds"] - clock
        wrong += [f"its clock is {ahead:+.1f} s off the others'"] if abs(ahead) > CLOCK_SECONDS else []
        wrong += [
            f"{name} {version}, elsewhere {common.get(name)}"
            for name, version in report.get("versions", {}).items()
            if version != common.get(name)
        ]
        if wrong:
            bad[node] = "; ".join(wrong)
    if not bad and any(not report.get("complete") for report in reports.values()):
        bad.update(_silent_in_network(reports))
    rates = {node: report["network"]["pairs_mib_per_s"] for node, report in reports.items() if "network" in report}
    named = {(node, nodes[int(place)]): rate for node, pairs in rates.items() for place, rate in pairs.items()}
    return {**slow_nodes(named), **bad}


def _silent_in_network(reports: Mapping[str, Any]) -> dict[str, str]:
    """Nodes that did not come through the last part although others did."""
    late = [node for node, report in reports.items() if not report.get("complete")]
    if len(late) == len(reports):
        return {}
    return dict.fromkeys(late, "did not finish its examination")


def _most_common(found: Sequence[dict[str, str] | None]) -> dict[str, str]:
    """The versions that most nodes have."""
    told = [versions for versions in found if versions]
    names = {name for versions in told for name in versions}
    return {name: Counter(versions.get(name, "") for versions in told).most_common(1)[0][0] for name in names}


def slow_nodes(rates: Mapping[tuple[str, str], float]) -> dict[str, str]:
    """The nodes to leave out, from the rate (MiB/s) that each node saw with each other, and why.

    Bisection by pairs: the node in most slow pairs goes, with all its pairs, until no slow pair is left; of two nodes
    in as many, the one that is slower with all others.
    """
    left, bad = dict(rates), {}
    if not left:
        return {}
    every = {name for pair in left for name in pair}
    best = [max(rate for pair, rate in left.items() if name in pair) for name in every]
    usual = statistics.median(best)  # of best pairs: a slow node spoils half of all pairs, and but one of these
    while slow := [pair for pair, rate in left.items() if rate < SLOW * usual]:
        names = {name for pair in left for name in pair}
        count = Counter(name for pair in slow for name in pair)
        own = {name: statistics.median([rate for pair, rate in left.items() if name in pair]) for name in names}
        worst = min(count, key=lambda name: (-count[name], own[name], name))
        others = sorted({name for pair in slow if worst in pair for name in pair} - {worst})
        rate = statistics.median([left[pair] for pair in slow if worst in pair])
        what = "its link" if len(others) == 1 and len(names) > 2 else "it is slow"
        bad[worst] = f"{what} with {', '.join(others)}: {rate:,.0f} MiB/s, usual are {usual:,.0f}"
        left = {pair: rate for pair, rate in left.items() if worst not in pair}
    return bad
