"""What was tried before: the attempts of a run over all its jobs, read from its folder. Standard library alone."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from megagpt import outcome
from megagpt.launch.decide import Attempt


def history(out: Path) -> list[Attempt]:
    """The attempts of the run that have ended, of all its jobs."""
    found = []
    for folder in sorted(path for path in (out / "attempts").glob("[0-9]*") if path.name.isdecimal()):
        ended = outcome.read(folder / "outcome.json")
        try:
            start = json.loads((folder / "start.json").read_text())
        except (OSError, ValueError):
            continue
        if ended is not None:
            found.append((start["job"], start["commits"], ended))
    after = [commits for _, commits, _ in found[1:]] + [newest_commit(out)]
    return [
        Attempt(job=job, progress=then != before, outcome=ended)
        for (job, before, ended), then in zip(found, after, strict=True)
    ]


def newest_commit(out: Path) -> int:
    """The newest checkpoint's step, as the run's events tell, wherever checkpoints are kept; -1 without one."""
    newest = -1
    with contextlib.suppress(OSError), (out / "events.jsonl").open(encoding="utf-8") as events:
        for line in events:
            with contextlib.suppress(ValueError):  # torn by a crash
                event = json.loads(line)
                newest = max(newest, event["step"]) if event["event"] == "checkpoint" else newest
    return newest
