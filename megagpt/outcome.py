"""How an attempt at a run ended, and whether another may help: one small file a rank, and one for the attempt.

    <out>/attempts/0003/rank-00005.json     what rank 5 knows of its own end; the first rank alone tells of success
    <out>/attempts/0003/outcome.json        the verdict over all ranks, by whoever started them

An attempt is one start of all ranks. Its ranks rarely die of one cause: the first falls, and its peers complain of a
lost connection. `verdict` picks the first cause and not the loudest. Standard library only: the supervisor reads
these files on a batch node that may have nothing but Python.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from megagpt.errors import RunFailure, UserError
from megagpt.files import write_whole

Result = Literal["finished", "stopped", "failed"]
Retry = Literal["never", "exclude_node", "back_off"]
Cause = Literal[
    "done",  # every step is done
    "asked",  # someone wrote the stop file or sent a signal
    "preempted",  # the scheduler wants the nodes
    "time_limit",  # the job's time is nearly over
    "user",  # a setting or a file that the user must mend
    "diverged",  # the loss is not a number, or the loss scale collapsed
    "out_of_memory",
    "corruption",  # a recomputed step or a replica's weights differ
    "node",  # a node or a device of it is gone or unfit
    "hang",  # a rank stopped making steps
    "rank_lost",  # a rank was killed and left no word
    "peer_lost",  # another rank went away: never the first cause
    "disk_full",
    "error",  # anything else
]
RETRIES: dict[Cause, Retry] = {
    "done": "never",
    "asked": "never",
    "preempted": "back_off",
    "time_limit": "back_off",
    "user": "never",
    "diverged": "never",
    "out_of_memory": "never",
    "corruption": "exclude_node",
    "node": "exclude_node",
    "hang": "back_off",
    "rank_lost": "back_off",
    "peer_lost": "back_off",
    "disk_full": "back_off",
    "error": "back_off",
}
ATTEMPT = "MEGAGPT_ATTEMPT"
"""The variable that names an attempt's folder, set for ranks by whoever starts them."""
_PEER = re.compile(
    r"connection (closed|reset|refused) by|connection was (likely )?closed|broken pipe|socket closed"
    r"|remote process exited|ncclRemoteError|timed out waiting .* recv|store .*(closed|failed|unreachable)",
    re.IGNORECASE,
)
_DEVICE = re.compile(r"uncorrectable ECC|\bXid\b|GPU is lost|fallen off the bus|unspecified launch failure", re.I)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a rank, or all ranks of an attempt, ended."""

    result: Result
    cause: Cause
    message: str = ""
    rank: int | None = None
    """The rank that the cause lies with; None where it is nobody's."""
    host: str = ""
    step: int | None = None
    """The last step that was done, where it is known."""
    time: float = 0.0
    """When it ended, in seconds since 1970 by its host's clock."""

    @property
    def retry(self) -> Retry:
        """What may help: nothing, another node, or another attempt after a while."""
        return RETRIES[self.cause]

    def __str__(self) -> str:
        place = f"rank {self.rank}" if self.rank is not None else ""
        place += f" on {self.host}" if self.host and place else self.host
        step = f" after step {self.step:,}" if self.step is not None else ""
        said = f": {self.message}" if self.message else ""
        return f"{self.result} ({self.cause.replace('_', ' ')}{', ' if place else ''}{place}){step}{said}"


def of_error(error: BaseException, *, rank: int) -> Outcome:
    """The outcome of a rank that an exception has ended."""
    if not isinstance(error, UserError):
        return ended("failed", _cause(error), f"rank {rank} died: {type(error).__name__}: {error}", rank=rank)
    culprit = error.rank if isinstance(error, RunFailure) and error.rank is not None else rank
    return ended("failed", _cause(error), str(error), rank=culprit)


def ended(
    result: Result, cause: Cause, message: str = "", *, rank: int | None, step: int | None = None, host: str = ""
) -> Outcome:
    """An outcome of `host`, or of this one, now."""
    host = host or socket.gethostname()
    return Outcome(result=result, cause=cause, message=message, rank=rank, host=host, step=step, time=time.time())


def begin(out: Path) -> Path:
    """Make the folder of a new attempt at the run in `out`; two that begin at once get two."""
    root = out / "attempts"
    root.mkdir(parents=True, exist_ok=True)
    number = max((int(folder.name) for folder in root.iterdir() if folder.name.isdecimal()), default=0)
    while True:
        number += 1
        try:
            (root / f"{number:04d}").mkdir()
        except FileExistsError:
            continue
        return root / f"{number:04d}"


def attempt_folder(out: Path) -> Path:
    """The attempt of this rank: as whoever started it says, else named after torchrun's round, else `launched`."""
    named = os.environ.get(ATTEMPT)
    if named:
        return Path(named)
    job, turn = os.environ.get("TORCHELASTIC_RUN_ID"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    folder = out / "attempts" / (f"torchrun-{job}-{int(turn):04d}" if job else "launched")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def rank_file(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank-{rank:05d}.json"


def write_rank(folder: Path, outcome: Outcome) -> None:
    """Leave a rank's word in the attempt's `folder`. A rank speaks once: what is there already, stays."""
    path = folder / rank_file(outcome.rank or 0)
    if not path.exists():
        write(path, outcome)


def write(path: Path, outcome: Outcome) -> None:
    """Write the outcome, whole."""
    write_whole(path, json.dumps(dataclasses.asdict(outcome), indent=1))


def read(path: Path) -> Outcome | None:
    """The outcome in the file, or None if there is none that can be read."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        known = {name: fields[name] for name in (spec.name for spec in dataclasses.fields(Outcome)) if name in fields}
        outcome = Outcome(**known)
    except (OSError, ValueError, TypeError):
        return None
    return outcome if outcome.cause in get_args(Cause) else None


def words(folder: Path) -> list[Outcome]:
    """What the ranks of an attempt left, the earliest first."""
    found = [word for path in sorted(folder.glob("rank-*.json")) if (word := read(path)) is not None]
    return sorted(found, key=lambda outcome: outcome.time)


def verdict(found: list[Outcome]) -> Outcome | None:
    """The one outcome of an attempt: success if a rank tells it, else the first failure that is a cause of its own.

    A run that is done stays done whatever became of a rank afterwards: its last checkpoint is committed.
    """
    for outcome in found:
        if outcome.result != "failed":
            return outcome
    causes = [outcome for outcome in found if outcome.cause not in ("peer_lost", "rank_lost")]
    killed = [outcome for outcome in found if outcome.cause == "rank_lost"]
    return next(iter([*causes, *killed, *found]), None)


def _cause(error: BaseException) -> Cause:
    if isinstance(error, RunFailure):
        return error.cause
    if any(isinstance(at, OSError) and at.errno in (errno.ENOSPC, errno.EDQUOT) for at in (error, error.__cause__)):
        return "disk_full"
    if isinstance(error, UserError):
        return "user"
    text = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out_of_memory"
    if _DEVICE.search(text):
        return "node"
    if isinstance(error, ConnectionError) or _PEER.search(text):
        return "peer_lost"
    return "error"
