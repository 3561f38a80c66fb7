"""Runs inside the batch script, outside any container: starts all ranks, watches them, and decides what comes next.

    python -m megagpt.launch.supervise <out>/launch/launch.json

    the time limit is near (USR1), or the job is preempted (TERM)  ->  the stop file; ranks save; come again
    a rank dies, hangs or says that it cannot go on                ->  decide.py: restart here, come again, or end
    a node dies, falls silent or fails its preflight               ->  faults.py: not again in this job, nor for a day
    the run is done                                                ->  it is done, whatever signal comes late

Standard library alone. What it did is in <out>/attempts/NNNN: start.json, outcome.json, preflight/, logs/.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from megagpt import outcome, stop
from megagpt.checkpoint import lineage
from megagpt.launch import faults, preflight_step, scheduler
from megagpt.launch.decide import Attempt, decide
from megagpt.launch.lifelines import Lifelines, Line
from megagpt.launch.spec import Launch, read_launch
from megagpt.launch.srun import srun_command
from megagpt.outcome import Cause, Outcome
from megagpt.parallel.launcher import LIFELINE, TOKEN

LOOK_SECONDS = 0.1
GRACE_SECONDS = 2.0
"""For the other ranks to say what they know, after the first has fallen."""
LEAVE_SECONDS = 60.0
"""For ranks to end once the run is saved and its outcome written."""
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
        folder = outcome.begin(self.out)
        (folder / "logs").mkdir()
        start = {"job": self.restart, "nodes": nodes, "time": time.time(), "commits": _commit(self.out)}
        (folder / "start.json").write_text(json.dumps(start))
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
        log = folder / "logs" / "srun.log"
        with log.open("wb") as output:
            process = subprocess.Popen(  # noqa: S603 - the launch's own command
                [command[0], "--overlap", *command[1:]], env=environment, stdout=output, stderr=output
            )
        asked = self._watch(process, folder, lines, log)
        scheduler.end_step(process, self.job, {line.step_id for line in lines.alive() if line.step_id})
        return self._judge(folder, lines, log, process.returncode, asked=asked)

    def _watch(self, process: subprocess.Popen[bytes], folder: Path, lines: Lifelines, log: Path) -> bool:
        """Wait until the ranks have ended or must be; whether the user asked them to stop meanwhile."""
        told, asked, over = False, False, float("inf")
        while process.poll() is None and time.monotonic() < over:
            if self.reason is not None and not told:
                stop.ask(self.out, self.reason)
                told = True
            asked = asked or (not told and stop.asked(self.out) is not None)
            word = outcome.verdict(outcome.words(folder))
            if over == float("inf") and word is not None and word.result != "failed":
                over = time.monotonic() + LEAVE_SECONDS
            elif over == float("inf") and (word or self._fallen(lines) or scheduler.first_failed_task(log)):
                over = time.monotonic() + GRACE_SECONDS
            time.sleep(LOOK_SECONDS)
        return asked

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
        task = scheduler.first_failed_task(log)
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
        outcome.write(folder / "outcome.json", ended)
        return ended

    def _rest(self, seconds: float) -> None:
        """Wait before another attempt, unless the job is to end."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.reason is None:
            time.sleep(LOOK_SECONDS)

    def _take_signals(self) -> None:
        def note(number: int, _frame: FrameType | None) -> None:
            self.reason = self.reason or ("time_limit" if number == signal.SIGUSR1 else "preempted")

        signal.signal(signal.SIGUSR1, note)
        signal.signal(signal.SIGTERM, note)

    def _say(self, text: str, status: int = 0) -> int:
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} megagpt: {text}", flush=True)
        return status


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
    after = [commits for _, commits, _ in found[1:]] + [_commit(out)]
    return [
        Attempt(job=job, progress=then != before, outcome=ended)
        for (job, before, ended), then in zip(found, after, strict=True)
    ]


def _commit(out: Path) -> int:
    """The newest checkpoint's step; -1 without one."""
    newest = next(lineage.commits(out / "checkpoints"), None)
    return newest.step if newest else -1


def _of_node(node: str, why: str) -> Outcome:
    return outcome.ended("failed", "node", why, rank=None, host=node)


if __name__ == "__main__":
    sys.exit(Supervisor(read_launch(Path(sys.argv[1]))).run())
