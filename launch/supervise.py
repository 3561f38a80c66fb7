"""Runs inside the batch script, outside any container: starts all ranks, watches them, and decides what comes next.

    python -m megagpt.launch.supervise <out>/launch/launch.json

    the time limit is near (USR1), or the job is preempted (TERM)  ->  the stop file; ranks save; come again
    a rank dies, hangs or says that it cannot go on                ->  decide.py: restart here, come again, or end
    a node dies, falls silent or fails its preflight               ->  faults.py: not again for a day
    the run is done                                                ->  it is done, whatever signal comes late

Standard library alone. What it did is in <out>/attempts/NNNN: start.json, outcome.json, preflight/, logs/.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TypeVar

from megagpt import outcome, stop
from megagpt.files import write_whole
from megagpt.launch import faults, preflight_step, scheduler
from megagpt.launch.decide import decide
from megagpt.launch.history import history, newest_commit
from megagpt.launch.lifelines import Lifelines, Line
from megagpt.launch.spec import Launch, read_launch
from megagpt.launch.srun import srun_command
from megagpt.outcome import Cause, Outcome
from megagpt.parallel.launcher import LIFELINE, TOKEN

Written = TypeVar("Written")
LOOK_SECONDS = 0.1
DEPUTIES = 2
GRACE_SECONDS = 1.0
"""For the other ranks to say what they know, after the first has fallen."""
LEAVE_SECONDS = 60.0
"""For ranks to end once the run is saved and its outcome written."""
DISK_WAIT_SECONDS, DISK_SECONDS, FULL_BYTES = 5.0, 600.0, 1 << 20
ORPHAN_SECONDS = 10.0
"""After which a rank that ended well while others run counts as lost."""


class Supervisor:
    """One job's supervisor."""

    def __init__(self, launch: Launch) -> None:
        self.launch, self.out = launch, Path(launch.out)
        self.job = scheduler.own_job()
        self.restart = f"{self.job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        self.ledger = faults.ledger(launch.cluster_name)
        self.reason: Cause | None = None
        self.checked: set[str] = set()
        """Nodes that passed the whole preflight in this job."""

    def run(self) -> int:
        """The job's exit status: 0 if the run is done or saved, 2 if its user must mend something, else 1."""
        self._take_signals()
        self.out.mkdir(parents=True, exist_ok=True)
        if stop.asked(self.out) == "asked" and not self.restart.endswith(".0"):
            return self._say("the run is asked to stop, and was not running", 0)
        stop.forget(self.out)
        self._close_attempts()
        with Lifelines() as lines:
            deputies = self._start_deputies(lines.address)
            try:
                return self._keep_running()
            finally:
                for deputy in deputies:
                    deputy.terminate()

    def _start_deputies(self, address: str) -> list[subprocess.Popen[bytes]]:
        """On two other nodes of the job, in case that this one dies; a step each, so that each outlives the other."""
        host = scheduler.own_node()
        address = f"{host}:{address.rsplit(':', 1)[1]}"
        work = [sys.executable, "-m", "megagpt.launch.deputy", address, self.job, str(self.ledger)]
        step = ["srun", "--overlap", "--nodes=1", "--ntasks=1", "--mem=0", "--export=ALL", "--quiet"]
        others = [node for node in self._good_nodes() if node != host]
        return [subprocess.Popen([*step, f"--nodelist={node}", *work]) for node in others[-DEPUTIES:]]  # noqa: S603

    def _close_attempts(self) -> None:
        """Attempts of earlier jobs whose supervisor went with its node ended by that."""
        out = faults.excluded(self.ledger)
        for folder in sorted((self.out / "attempts").glob("[0-9]*")):
            if (folder / "start.json").exists() and not (folder / "outcome.json").exists():
                bad = [node for node in json.loads((folder / "start.json").read_text())["nodes"] if node in out]
                words = out[bad[0]] if bad else "its job ended without a word"
                lost = outcome.ended("failed", "node" if bad else "rank_lost", words, rank=None, host=(bad or [""])[0])
                word = None if bad else outcome.verdict(outcome.words(folder))
                self._ended(folder, word or lost)

    def _keep_running(self) -> int:
        while True:
            nodes = self._good_nodes()
            ended = self._attempt(nodes) if len(nodes) >= self.launch.nodes else self._too_few(nodes)
            decision = decide(
                history(self.out), self.launch.retries, enough_nodes=len(self._good_nodes()) >= self.launch.nodes
            )
            self._say(f"{decision.action}: {decision.why}")
            if decision.action == "end":
                return 0 if ended.result != "failed" else 2 if ended.cause == "user" else 1
            if decision.action == "leave":
                out = faults.excluded(self.ledger) if ended.result == "failed" else {}
                next_job = scheduler.come_again(self.job, self.launch.launch_folder() / "job.sh", out)
                return self._say(f"job {next_job} goes on", 0)
            self._rest(decision.pause_seconds)

    def _good_nodes(self) -> list[str]:
        """Nodes of this job that are not excluded, and whose slurmd answers."""
        out = faults.excluded(self.ledger)
        nodes = [node for node in scheduler.nodes_of_job() if node not in out]
        places = scheduler.addresses(nodes)
        return [node for node in nodes if node in places and scheduler.answers(places[node])]

    def _too_few(self, nodes: list[str]) -> Outcome:
        """An attempt that could not begin, on record."""
        folder = self._begin(nodes)
        words = f"{len(nodes)} good nodes are left in job {self.job}, of {self.launch.nodes} that the layout needs"
        return self._ended(folder, outcome.ended("failed", "node", words, rank=None))

    def _begin(self, nodes: list[str]) -> Path:
        folder = self._patiently(lambda: outcome.begin(self.out))
        (folder / "logs").mkdir()
        start = {"job": self.restart, "nodes": nodes, "time": time.time(), "commits": newest_commit(self.out)}
        self._patiently(lambda: write_whole(folder / "start.json", json.dumps(start)))
        return folder

    def _attempt(self, nodes: list[str]) -> Outcome:
        """Check the nodes, then run all ranks on as many good ones as are needed, to their end."""
        folder = self._begin(nodes)
        bad = preflight_step.unfit(self.launch, nodes, folder, whole=not set(nodes) <= self.checked)
        for node, why in bad.items():
            self._say(f"{node} is left out: {why}")
            faults.remember(self.ledger, _of_node(node, why), job=self.job)
        good = [node for node in nodes if node not in bad]
        self.checked.update(good)
        if len(good) < self.launch.nodes:
            words = "; ".join(f"{node}: {why}" for node, why in bad.items())
            return self._ended(folder, outcome.ended("failed", "node", f"preflight: {words}", rank=None))
        if self.reason is not None:
            return self._ended(folder, outcome.ended("stopped", self.reason, rank=None))
        with Lifelines() as lines:
            ended = self._run_ranks(good[: self.launch.nodes], folder, lines)
        faults.remember(self.ledger, ended, job=self.job)
        return self._ended(folder, ended)

    def _run_ranks(self, nodes: list[str], folder: Path, lines: Lifelines) -> Outcome:
        low, high = self.launch.cluster.ports
        environment = {
            **os.environ,
            **self.launch.environment(),
            outcome.ATTEMPT: str(folder),
            TOKEN: lines.token,
            LIFELINE: lines.address,
            "MASTER_ADDR": nodes[0],
            "MASTER_PORT": str(random.SystemRandom().randint(low, high)),
        }
        command = srun_command(self.launch, nodes=nodes, attempt=int(folder.name))
        self._say(f"attempt {int(folder.name)} on {','.join(nodes)}")
        (folder / "nodes").write_text("\n".join(nodes))
        log = folder / "logs" / "srun.log"
        with log.open("wb") as output:
            process = subprocess.Popen(  # noqa: S603 - the launch's own command
                [command[0], "--overlap", *command[1:]], env=environment, stdout=output, stderr=output
            )
        asked, noticed = self._watch(process, folder, lines, log)
        scheduler.end_step(process, self.job, {line.step_id for line in lines.lines if line.ended is None})
        self._see_them_gone(lines)
        ended = self._judge(folder, lines, log, process.returncode, asked=asked)
        return ended if ended.result == "finished" else dataclasses.replace(ended, time=noticed)

    def _see_them_gone(self, lines: Lifelines) -> None:
        """Wait until no rank holds a GPU of a node that answers: the next attempt needs it."""
        until = time.monotonic() + LEAVE_SECONDS
        while any(self._reachable(line) for line in lines.alive()) and time.monotonic() < until:
            time.sleep(LOOK_SECONDS)

    def _watch(
        self, process: subprocess.Popen[bytes], folder: Path, lines: Lifelines, log: Path
    ) -> tuple[bool, float]:
        """Wait until the ranks have ended or must be; whether the user asked them to stop, and when it was seen."""
        told, asked, over, noticed = False, False, float("inf"), 0.0
        while process.poll() is None and time.monotonic() < over:
            if self.reason is not None and not told:
                stop.ask(self.out, self.reason)
                told = True
            asked = asked or (not told and stop.asked(self.out) is not None)
            word = outcome.verdict(outcome.words(folder))
            well = word is not None and word.result != "failed"
            if not noticed and (word or self._fallen(lines) or scheduler.first_failed_task(log)):
                noticed = time.time()
                silent = any(line.silent for line in lines.lost())  # which says all, and no rank knows more
                over = time.monotonic() + (LEAVE_SECONDS if well else 0.0 if silent else GRACE_SECONDS)
            time.sleep(LOOK_SECONDS)
        return asked, noticed or time.time()

    def _fallen(self, lines: Lifelines) -> bool:
        """Whether a connection tells of a lost node, or of a rank that went while others stay."""
        for line in lines.lost():
            old = time.monotonic() - (line.ended or 0.0)
            if line.silent or (lines.alive() and (old > ORPHAN_SECONDS or not self._reachable(line))):
                return True
        return False

    def _reachable(self, line: Line) -> bool:
        place = scheduler.addresses([line.host]).get(line.host)
        return place is None or scheduler.answers(place)

    def _judge(self, folder: Path, lines: Lifelines, log: Path, status: int, *, asked: bool) -> Outcome:
        """How the attempt ended, from what its ranks said, who fell silent, and what srun saw."""
        word = outcome.verdict(outcome.words(folder))
        if word is not None and word.result == "finished":
            return word
        if word is not None and word.result == "stopped":
            return word if asked else self._stopped(word)
        gone = next((line for line in lines.lost() if line.silent or not self._reachable(line)), None)
        if gone is not None:
            return outcome.ended(
                "failed", "node", f"{gone.host} does not answer any more", rank=gone.rank, host=gone.host
            )
        if word is not None and word.cause != "peer_lost":
            return word
        if self.reason is not None:
            return outcome.ended("stopped", self.reason, "before it could save", rank=None)
        if shutil.disk_usage(self.out).free < FULL_BYTES:  # then ranks cannot leave a word either
            return outcome.ended("failed", "disk_full", f"no space is left in {self.out}", rank=None)
        task = scheduler.first_failed_task(log)
        if task is None and lines.lost():
            first = lines.lost()[0]
            task = first.rank, first.host, "ended without a word"
        if task is not None:
            rank, host, end = task
            return outcome.ended("failed", "rank_lost", f"rank {rank} on {host}: {end}", rank=rank, host=host)
        return word or outcome.ended("failed", "error", f"srun ended with status {status}; see {log}", rank=None)

    def _stopped(self, word: Outcome) -> Outcome:
        """A stop that nobody asked for by the file: the scheduler's, by signals to the ranks or to this process."""
        if self.reason is None and scheduler.job_state(self.job) == "RUNNING":
            self.reason = "preempted"
        cause = self.reason or "asked"
        return outcome.ended("stopped", cause, word.message, rank=None, step=word.step)

    def _ended(self, folder: Path, ended: Outcome) -> Outcome:
        self._patiently(lambda: outcome.write(folder / "outcome.json", ended))
        return ended

    def _patiently(self, write: Callable[[], Written]) -> Written:
        """Do something that writes; while the disk is full, try again for some minutes: someone may make room."""
        until = time.monotonic() + DISK_SECONDS
        while True:
            try:
                return write()
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or time.monotonic() > until or self.reason:
                    raise
                self._say(f"waiting for room on the disk of {self.out}")
                self._rest(DISK_WAIT_SECONDS)

    def _rest(self, seconds: float) -> None:
        """Wait before another attempt, unless the job is to end."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.reason is None:
            time.sleep(LOOK_SECONDS)

    def _take_signals(self) -> None:
        def note(number: int, _frame: FrameType | None) -> None:
            cause: Cause = "time_limit" if number == signal.SIGUSR1 else "preempted"
            self.reason = self.reason or cause

        signal.signal(signal.SIGUSR1, note)
        signal.signal(signal.SIGTERM, note)

    def _say(self, text: str, status: int = 0) -> int:
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} megagpt: {text}", flush=True)
        return status


def _of_node(node: str, why: str) -> Outcome:
    return outcome.ended("failed", "node", why, rank=None, host=node)


if __name__ == "__main__":
    sys.exit(Supervisor(read_launch(Path(sys.argv[1]))).run())
