"""The agent of one node under `hostfile`: starts the node's ranks and ends them when its input ends.

Its input is one line of JSON, the work (`hostfile.work_of`); then the word `stop`, which asks the ranks to save and
stop; then the end of the input, at which no rank may go on. Standard library alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

GRACE_SECONDS = 5.0


def start(work: dict[str, Any]) -> list[subprocess.Popen[bytes]]:
    """One process a rank, each with its own log, all in sessions of their own."""
    found = []
    for local in range(work["ranks"]):
        rank = work["first_rank"] + local
        place = {"RANK": str(rank), "LOCAL_RANK": str(local)}
        with Path(work["logs"], f"rank-{rank}.log").open("ab") as log:
            found.append(
                subprocess.Popen(  # noqa: S603 - the argument list of the launch
                    work["command"],
                    cwd=work["folder"],
                    env={**os.environ, **work["environment"], **place},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    return found


def signal_all(processes: list[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in processes:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.killpg(process.pid, number)


def listen(processes: list[subprocess.Popen[bytes]]) -> None:
    """Obey the input until it ends, then kill what still runs."""
    for line in sys.stdin:
        if line.strip() == "stop":
            signal_all(processes, signal.SIGTERM)
    signal_all(processes, signal.SIGKILL)


def wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all ranks; the first that fails takes the others along after a grace period. Returns its status."""
    status, deadline = 0, float("inf")
    while any(process.poll() is None for process in processes):
        failed = next((process.returncode for process in processes if process.poll()), 0)
        if failed and not status:
            status, deadline = failed, time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            signal_all(processes, signal.SIGKILL)
        time.sleep(0.05)
    status = status or next((process.returncode for process in processes if process.returncode), 0)
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    ranks = start(json.loads(sys.stdin.readline()))
    threading.Thread(target=listen, args=(ranks,), daemon=True).start()
    result = wait(ranks)
    sys.stdout.flush()
    os._exit(result)  # the listening thread may hold the input's lock
