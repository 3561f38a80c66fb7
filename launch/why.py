"""Why an attempt failed, from what its ranks left and printed: the first cause, and not the loudest.

One rank falls; seconds later all others print long traces about lost connections. So a line that blames a peer counts
only where nothing else is said, and then for the peer it names. Among causes of one weight the earliest clock wins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megagpt import outcome
from megagpt.outcome import Cause, Outcome

CAUSES: tuple[tuple[Cause, str], ...] = (
    (
        "node",
        r"uncorrectable ECC|\bXid\b|GPU is lost|fallen off the bus|Node failure on|NODE_FAIL",
    ),
    ("out_of_memory", r"out of memory|OutOfMemoryError|oom[-_ ]kill|MemoryError|Out Of Memory"),
    ("disk_full", r"No space left on device|Disk quota exceeded"),
    ("diverged", r"the run has diverged"),
    ("user", r"^megagpt: (?!warning|dry run|attempt|rank \d+ )\S.*"),
    ("error", r"^(\[rank\d+\]: )?[A-Za-z_][\w.]*(Error|Exception|Failure)\b(: .*)?$"),
    ("rank_lost", r"task \d+: (Killed|Segmentation fault|Bus error|Aborted)|was killed by SIG\w+|Fatal Python error"),
)
NAMED = 5
"""So many of the causes say by themselves what went wrong; then come errors of any kind, and deaths without a word."""
PEER = re.compile(
    r"(connection|socket).{0,40}(closed|reset|refused|timed? ?out)|broken pipe|remote process exited|ncclRemoteError"
    r"|Watchdog caught collective operation timeout|NCCL communicator was aborted|ProcessGroup.*(abort|timeout)"
    r"|DistBackendError|DistNetworkError|TCPStore|CANCELLED AT|SIGTERM|task \d+: Terminated|\[Gloo\]|gloo/transport",
    re.IGNORECASE,
)
CLOCK = re.compile(r"(\d{4}-\d\d-\d\d[T ])?(\d\d:\d\d:\d\d(?:[.,]\d+)?)")
RANK = re.compile(r"(?:\brank[ -]?|\[rank|task )(\d+)", re.IGNORECASE)
NODE = re.compile(r"(?:srun|slurmstepd): error: (?:Node failure on )?([\w.-]+)")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The first cause that could be found."""

    cause: Cause
    message: str
    rank: int | None
    host: str
    source: str
    """The log and its line, or the rank's own outcome file."""


@dataclass(frozen=True)
class _Line:
    weight: int
    clock: str
    finding: Finding


def first_cause(words: Sequence[Outcome], logs: Mapping[str, str]) -> Finding | None:
    """The first cause in the ranks' outcomes and in `logs` (name -> text; rank-7.log is rank 7's).

    None if nothing failed, as far as all of them say.
    """
    told = outcome.verdict(list(words))
    if told is not None and (told.result != "failed" or told.cause not in ("peer_lost", "rank_lost")):
        return None if told.result != "failed" else _of_outcome(told)
    hosts = {word.rank: word.host for word in words if word.rank is not None}
    lines = [line for name, text in logs.items() for line in _suspects(name, text, hosts)]
    own = [line for line in lines if line.weight < len(CAUSES)]
    if own:
        return min(own, key=_nearness).finding
    if told is not None and told.cause == "rank_lost":
        return _of_outcome(told)
    silent = _silent(logs, lines)
    if silent is not None:
        message = "ended without a word while its peers lost their connection to it"
        return Finding(cause="rank_lost", message=message, rank=silent, host=hosts.get(silent, ""), source="all logs")
    if lines:
        return min(lines, key=lambda line: (not line.clock, line.clock)).finding
    return _of_outcome(told) if told is not None else None


def _nearness(line: _Line) -> tuple[int, bool, str, int]:
    return max(0, line.weight - NAMED + 1), not line.clock, line.clock, line.weight


def _of_outcome(told: Outcome) -> Finding:
    source = "outcome of the attempt" if told.rank is None else f"rank-{told.rank:05d}.json"
    return Finding(cause=told.cause, message=told.message, rank=told.rank, host=told.host, source=source)


def _suspects(name: str, text: str, hosts: Mapping[int, str]) -> list[_Line]:
    """The lines of one log that tell of a failure, with the last clock seen before each."""
    of_file = re.search(r"rank-(\d+)", name)
    found, clock = [], ""
    for number, line in enumerate(text.splitlines(), start=1):
        seen = CLOCK.search(line[:80])
        clock = seen[2].replace(",", ".") if seen else clock
        weight, cause = _weigh(line)
        if cause is None:
            continue
        named = RANK.search(line)
        rank = int(of_file[1]) if of_file else int(named[1]) if named else None
        node = NODE.search(line)
        host = node[1] if node else hosts.get(rank, "") if rank is not None else ""
        message = line.strip()[:300]
        finding = Finding(cause=cause, message=message, rank=rank, host=host, source=f"{name}, line {number}")
        found.append(_Line(weight, clock, finding))
    return found


def _weigh(line: str) -> tuple[int, Cause | None]:
    """How near to a cause the line is: 0 the nearest, len(CAUSES) for those that blame a peer."""
    for weight, (cause, pattern) in enumerate(CAUSES):
        if re.search(pattern, line):
            return (len(CAUSES), "peer_lost") if cause == "error" and PEER.search(line) else (weight, cause)
    return (len(CAUSES), "peer_lost") if PEER.search(line) else (0, None)


def _silent(logs: Mapping[str, str], lines: Sequence[_Line]) -> int | None:
    """The one rank whose log shows nothing wrong, where others complain of a peer."""
    ranks = {int(found[1]) for name in logs if (found := re.search(r"rank-(\d+)", name))}
    complaining = {line.finding.rank for line in lines}
    quiet = sorted(ranks - complaining)
    return quiet[0] if len(quiet) == 1 and complaining & ranks else None
