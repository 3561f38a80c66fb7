"""Stands in when the batch node dies: `python -m megagpt.launch.deputy HOST:PORT JOB LEDGER`, on another node.

A job that may outlive its nodes (--no-kill) also outlives the node of its batch script, and then holds all others,
idle, until its time is up: seen on SLURM 22.05. A deputy keeps a connection to the supervisor. When that breaks and
the batch node's slurmd does not answer either, it sends the job back to the queue. Standard library alone.
"""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

from megagpt import outcome
from megagpt.launch import faults, scheduler
from megagpt.launch.lifelines import keep_alive

DOUBTS, DOUBT_SECONDS = 3, 1.0


def wait_for_end(address: str) -> None:
    """Return once the supervisor, or its node, or the wire to it is gone."""
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=30.0) as line:
        line.settimeout(None)
        keep_alive(line)
        try:
            line.recv(1)
        except OSError:  # silence, or a reset
            return


def gone(host: str) -> bool:
    """Whether a node's slurmd does not answer, asked again and again."""
    place = scheduler.addresses([host])[host]
    for _ in range(DOUBTS):
        if scheduler.answers(place):
            return False
        time.sleep(DOUBT_SECONDS)
    return True


def main(address: str, job: str, ledger: Path) -> None:
    """Watch over the supervisor of `job`, and send the job back to the queue if its node is lost."""
    host = address.rsplit(":", 1)[0]
    wait_for_end(address)
    if gone(host):
        words = f"{host}, the batch node, does not answer any more"
        faults.remember(ledger, outcome.ended("failed", "node", words, rank=None, host=host), job=job)
        print(f"megagpt: {words}; job {job} goes back to the queue", flush=True)
        scheduler.asked("scontrol", "requeue", job)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
