"""The memory of bad nodes, over all jobs of a cluster: ~/.local/state/megagpt/faults/CLUSTER/NODE/TIME.json

One small file a fault, so that jobs that end together need no lock. A node is out after one fault that was surely its
own, or two deaths that may have been, for a day; deleting its folder readmits it. Standard library alone.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from megagpt.files import write_whole
from megagpt.outcome import Cause, Outcome

MEMORY_SECONDS = 86_400.0
OUT = 2
WEIGHTS: dict[Cause | str, int] = {"node": 2, "corruption": 2, "rank_lost": 1, "hang": 1}
"""How surely a cause is the node's own fault; those that are not here never are."""


def ledger(cluster: str) -> Path:
    """The folder of one cluster's faults."""
    return Path.home() / ".local/state/megagpt/faults" / cluster


def remember(root: Path, found: Outcome, *, job: str) -> None:
    """Record the fault of the outcome's host, if it may be the host's."""
    if not found.host or found.cause not in WEIGHTS:
        return
    folder = root / found.host
    folder.mkdir(parents=True, exist_ok=True)
    fault = {"time": time.time(), "cause": found.cause, "message": found.message, "job": job}
    write_whole(folder / f"{time.time_ns()}.json", json.dumps(fault))


def excluded(root: Path) -> dict[str, str]:
    """Node -> why, for those that are out."""
    found: dict[str, str] = {}
    for folder in sorted(root.glob("*")) if root.is_dir() else ():
        faults = [fault for path in sorted(folder.glob("*.json")) if (fault := _recent(path)) is not None]
        if sum(WEIGHTS.get(fault["cause"], 0) for fault in faults) >= OUT:
            found[folder.name] = "; ".join(
                f"{fault['cause'].replace('_', ' ')}: {fault['message']}" for fault in faults
            )
    return found


def forget(root: Path) -> None:
    """Readmit all nodes of a ledger that nobody needs any more."""
    shutil.rmtree(root, ignore_errors=True)


def _recent(path: Path) -> dict[str, str] | None:
    try:
        fault = json.loads(path.read_text(encoding="utf-8"))
        return fault if time.time() - fault["time"] < MEMORY_SECONDS else None
    except (OSError, ValueError, KeyError):
        return None
