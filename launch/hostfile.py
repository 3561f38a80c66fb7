"""Ranks over ssh, for machines without a scheduler: one connection a node, which is the life line of its ranks.

Each node gets its work as JSON on the connection's input: the environment, secrets among it, is on no command line and
in no file. The input then stays open. When it ends, because the launcher died, was interrupted, or another node
failed, the node's agent (`node.py`) kills its ranks: nothing has to be searched for and killed by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from megagpt import outcome
from megagpt.errors import UserError
from megagpt.launch import faults
from megagpt.launch.spec import Launch, read_launch

GRACE_SECONDS = 20.0
SILENT = (255, -signal.SIGKILL)
"""How a connection ends to a node that does not answer: by ssh's own failure, or cut after the grace period."""


def ssh_command(launch: Launch, host: str) -> list[str]:
    """Start the agent on `host`; its work follows on the input."""
    remote = ["env", f"PYTHONPATH={launch.source}", launch.command[0], "-m", "megagpt.launch.node"]
    return ["ssh", "-T", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=5", host, shlex.join(remote)]


def plan_text(launch: Launch, *, layout: str) -> str:
    """What will be run, for a dry run."""
    lines = [
        f"# megagpt: {launch.name}, {launch.world_size()} ranks = {layout}.",
        f"# each rank: {shlex.join(launch.command)}",
    ]
    for place, host in enumerate(launch.hosts):
        first = place * launch.gpus_per_node
        ranks = f"ranks {first} to {first + launch.gpus_per_node - 1}" if place < launch.nodes else "a spare"
        lines += [f"# {ranks}:", shlex.join(ssh_command(launch, host))]
    return "\n".join(lines) + "\n"


def work_of(launch: Launch, place: int, *, port: int, attempt: int, inherited: dict[str, str]) -> dict[str, object]:
    """What the agent of node `place` is to do."""
    kept = {name: inherited[name] for name in launch.cluster.secrets if name in inherited}
    meeting = {"MASTER_ADDR": _address(launch.hosts[0]), "MASTER_PORT": str(port)}
    meeting[outcome.ATTEMPT] = str(launch.attempt_folder(attempt))
    sizes = {"WORLD_SIZE": str(launch.world_size()), "LOCAL_WORLD_SIZE": str(launch.gpus_per_node)}
    return {
        "command": list(launch.command),
        "folder": launch.folder,
        "logs": str(launch.log(attempt, 0).parent),
        "first_rank": place * launch.gpus_per_node,
        "ranks": launch.gpus_per_node,
        "environment": {**launch.environment(), **kept, **meeting, **sizes},
    }


class Nodes:
    """The connections of one attempt."""

    def __init__(self, launch: Launch, attempt: int) -> None:
        port = launch.cluster.ports[0] + secrets.randbelow(launch.cluster.ports[1] - launch.cluster.ports[0] + 1)
        self.running: dict[str, subprocess.Popen[str]] = {}
        self.ended: dict[str, int] = {}
        """The exit status of each connection that is over."""
        for place, host in enumerate(launch.hosts):
            process = subprocess.Popen(  # noqa: S603 - an argument list of the launch
                ssh_command(launch, host), stdin=subprocess.PIPE, text=True, start_new_session=True
            )
            self.running[host] = process
            work = work_of(launch, place, port=port, attempt=attempt, inherited=dict(os.environ))
            self._say(process, json.dumps(work))

    def stop(self) -> None:
        """Ask every rank to save and stop at its next step."""
        for process in self.running.values():
            self._say(process, "stop")

    def wait(self) -> tuple[str, int]:
        """Wait for all nodes; after the first failure, end the others. Returns the host that failed and its status."""
        failed, status = "", 0
        while self.running:
            for host, process in list(self.running.items()):
                code = process.poll()
                if code is None:
                    continue
                del self.running[host]
                self.ended[host] = code
                self._hang_up(process)
                if code and not status:
                    failed, status = host, code
                    self.close()
            time.sleep(0.05)
        return failed, status

    def close(self) -> None:
        """Cut every life line; connections that outlive the grace period are killed."""
        for process in self.running.values():
            self._hang_up(process)
        deadline = time.monotonic() + GRACE_SECONDS
        for process in self.running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            if process.poll() is None:
                process.kill()
                process.wait()

    @staticmethod
    def _hang_up(process: subprocess.Popen[str]) -> None:
        with contextlib.suppress(BrokenPipeError):  # what was never read is lost with it
            process.stdin.close()  # type: ignore[union-attr]

    @staticmethod
    def _say(process: subprocess.Popen[str], line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, and its exit status says why
            process.stdin.write(line + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]


def run(launch: Launch) -> int:
    """Run the launch to its end, starting again after failures as often as it allows; returns the exit status.

    A node that falls silent, or whose ranks die twice, is left out from then on, for a day.
    """
    asked: list[int] = []
    ledger = faults.ledger(launch.cluster_name)
    pause = launch.retries.back_off_seconds
    for _ in range(launch.retries.inside + 1):
        chosen = with_good_hosts(launch, faults.excluded(ledger))
        attempt = int(outcome.begin(Path(launch.out)).name)
        launch.log(attempt, 0).parent.mkdir()
        nodes = Nodes(chosen, attempt)

        def ask(number: int, _frame: FrameType | None, nodes: Nodes = nodes) -> None:
            asked.append(number)
            nodes.stop()

        previous = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            host, status = nodes.wait()
        finally:
            nodes.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        told = outcome.verdict(outcome.words(launch.attempt_folder(attempt)))
        ended = fault_of(chosen, attempt, told, nodes.ended) if status and not asked else told
        if ended is not None:
            outcome.write(launch.attempt_folder(attempt) / "outcome.json", ended)
        if not status or asked or (ended is not None and ended.retry == "never"):
            return status
        if ended is not None:
            faults.remember(ledger, ended, job=f"hostfile-{os.getpid()}")
        print(
            f"megagpt: attempt {attempt} failed on {host}, exit status {status}; again in {pause:.0f} s",
            file=sys.stderr,
        )
        time.sleep(pause)
        pause = min(2 * pause, 300)
    return 1


def with_good_hosts(launch: Launch, excluded: Mapping[str, str]) -> Launch:
    """The launch on the first of its hosts that are not out. Raises UserError if they are too few."""
    good = [host for host in launch.hosts if _address(host) not in excluded]
    if len(good) < launch.nodes:
        out = "; ".join(f"{_address(host)}: {excluded[_address(host)]}" for host in launch.hosts if host not in good)
        raise UserError(
            f"{len(good)} good hosts are left, of {launch.nodes} that the layout needs ({out}).",
            f"Name more --hosts, or mend those and delete their folders in {faults.ledger(launch.cluster_name)}.",
        )
    return dataclasses.replace(launch, hosts=tuple(good[: launch.nodes]))


def fault_of(
    launch: Launch, attempt: int, told: outcome.Outcome | None, ended: Mapping[str, int]
) -> outcome.Outcome | None:
    """How an attempt failed: by a node that fell silent after it had begun, else as its ranks told.

    Where they told, the host at fault is called as the launch calls it.
    """
    gone = [place for place, host in enumerate(launch.hosts) if ended.get(host) in SILENT]
    begun = [place for place in gone if launch.log(attempt, place * launch.gpus_per_node).exists()]
    if begun and (told is None or told.cause in ("peer_lost", "rank_lost")):
        host = _address(launch.hosts[begun[0]])
        return outcome.ended("failed", "node", f"{host} does not answer any more", rank=None, host=host)
    if told is None or told.rank is None:
        return told
    return dataclasses.replace(told, host=_address(launch.hosts[told.rank // launch.gpus_per_node]))


def _address(host: str) -> str:
    """A host without its user."""
    return host.rpartition("@")[2]


if __name__ == "__main__":
    sys.exit(run(read_launch(Path(sys.argv[1]))))
