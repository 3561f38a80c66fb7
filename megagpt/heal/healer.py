"""What is done about a fault: the run's own doctor, between the training loop and the parts that find faults.

Every finding goes to events.jsonl with its step, the rank at fault (null where none is), its cause and the action.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

from megagpt import outcome
from megagpt.checkpoint.saver import Progress, Saver
from megagpt.config import Run
from megagpt.data.corpus import Corpus
from megagpt.errors import RunFailure
from megagpt.heal.attempts import Beat, put_aside, read_beats
from megagpt.heal.clock import Clock
from megagpt.heal.health import SKIP_WINDOW, Health
from megagpt.heal.stores import StoreTimes
from megagpt.heal.stragglers import OwnTimes
from megagpt.heal.watchdog import Watchdog
from megagpt.mesh import Mesh
from megagpt.outcome import Cause
from megagpt.parallel import ranks
from megagpt.parallel.engine import Engine, Step
from megagpt.report.journal import Journal
from megagpt.report.metrics import append_event, read_records

OVERFLOW = "gradient not finite"


@contextlib.contextmanager
def watched(run: Run, out: Path, mesh: Mesh, clock: Clock) -> Iterator[Watchdog]:
    """Give this rank a watchdog, and what it leaves on disk a place in the attempt's folder."""
    folder = outcome.attempt_folder(out)
    if mesh.rank == 0:
        clock.reached = max((record["step"] for record in read_records(out / "metrics.jsonl")), default=0)
        put_aside(folder)

    def tell(culprit: Beat, words: str, first: bool) -> None:
        step = clock.mark().step  # of the culprit only a beat is known, which may be a second old
        ranks.leave_word(_word("hang", words, rank=culprit.rank, host=culprit.host, step=step), folder)
        if first:
            place = {"step": step, "rank": culprit.rank, "host": culprit.host}
            append_event(out, "hang", **place, cause=words, action="ended")

    try:
        with Watchdog(run.heal, clock, folder, rank=mesh.rank, world=mesh.world_size, tell=tell) as watchdog:
            yield watchdog
    except RunFailure as failure:
        step = clock.mark().step
        host = next((beat.host for beat in read_beats(folder) if beat.rank == failure.rank), "")
        if failure.rank is not None:
            word = _word(failure.cause, str(failure), rank=failure.rank, host=host, step=step)
            outcome.write_rank(folder, word)
        if mesh.rank == 0:
            place = {"step": step, "rank": failure.rank, "host": host}
            append_event(out, failure.cause, **place, cause=failure.rule, action="ended")
        raise


def _word(cause: Cause, message: str, *, rank: int, host: str, step: int) -> outcome.Outcome:
    """The word of the rank at fault, which may not be able to leave one; the first that knows of it writes it."""
    return dataclasses.replace(outcome.ended("failed", cause, message, rank=rank, step=step), host=host)


def _skipped_before(journal: Journal, *, fp16: bool) -> list[int]:
    """The last steps that count for heal.skip_budget, from the events of earlier attempts.

    The rank that speaks has the events and tells the others, which judge as it does. Every rank must call it.
    """
    found = {
        event["step"]
        for event in journal.events()
        if event["event"] == "skipped" and not (fp16 and event["cause"] == OVERFLOW)
    }
    newest = sorted(found)[-SKIP_WINDOW:]
    told = ranks.sum_over_ranks([float(at) for at in [*newest, *[0] * (SKIP_WINDOW - len(newest))]])
    return [int(at) for at in told if at]


class Healer:
    """Judges each step, goes back where that helps, and compares the ranks' speeds."""

    def __init__(
        self,
        run: Run,
        saver: Saver,
        corpora: list[Corpus],
        journal: Journal,
        clock: Clock,
        progress: Progress,
    ) -> None:
        self._run, self._saver, self._corpora = run, saver, corpora
        self._journal, self._clock = journal, clock
        self._health = Health(run.heal, progress.health, fp16=run.train.precision == "fp16")
        self._health.skipped_before(_skipped_before(journal, fp16=run.train.precision == "fp16"))
        self._times, self._stores = OwnTimes(), StoreTimes(corpora)

    def examine(self, done: Step, progress: Progress) -> Progress | None:
        """Look at the step that was just done; where the run stands now if it went back, else None.

        Raises RunFailure if the run has diverged, or spiked once more than it may.
        """
        verdict = self._health.judge(done, progress.step)
        progress.health = self._health.state()
        if verdict == "skipped":
            cause = OVERFLOW if math.isfinite(done.loss) else "loss not finite"
            self._journal.event("skipped", step=progress.step, rank=done.seen_by, cause=cause, action="no update")
        elif verdict == "spike":
            return self._answer_spike(done, progress)
        return None

    def _answer_spike(self, done: Step, progress: Progress) -> Progress | None:
        first = self._health.spike_began()
        cause = f"loss {done.loss:.4f}, {self._health.score(done.loss):.1f} deviations above the median"
        spike = {"step": progress.step, "rank": None, "cause": cause, "began": first}
        if not self._saver.has_before(first):
            self._health.let_pass()
            self._journal.event("spike", **spike, action="none: there is no checkpoint before it")
            return None
        if self._health.rollbacks >= self._run.heal.rollbacks:
            raise RunFailure(
                f"step {progress.step:,} has a spike of the {cause}, after {self._health.rollbacks} rollbacks; "
                f"heal.rollbacks = {self._run.heal.rollbacks}: the run has diverged.",
                "Continue with a lower optim.lr, or look at the data that was left out, in events.jsonl.",
                cause="diverged",
            )
        self._clock.enter("save", progress.step)
        self._saver.finish(self._journal)
        back = self._saver.resume(self._corpora, self._journal, before=first)
        skipped = back.cursor.consumed, progress.cursor.consumed
        back.cursor = back.cursor.skipping(*skipped)
        self._health = Health(
            self._run.heal,
            {**back.health, "rollbacks": self._health.rollbacks + 1},
            fp16=self._run.train.precision == "fp16",
        )
        back.health = self._health.state()
        self._journal.went_back(back.step)
        action = f"back to step {back.step}, without the sequences {skipped[0]} to {skipped[1] - 1}"
        self._journal.event("spike", **spike, action=action)
        self._saver.save(back, self._journal)
        self._saver.finish(self._journal)  # so that whoever continues the run leaves them out as well
        return back

    def compare_ranks(self, engine: Engine, progress: Progress, waited: float) -> None:
        """Note this rank's own time for a step; every report.every steps, tell of ranks that are much slower, and of
        stores that are in trouble.
        """
        self._times.add(engine.forward_seconds() + waited)
        if progress.step % self._run.report.every:
            return
        for slow in self._times.compare(engine.mesh, self._run.heal.straggler):
            self._journal.event(
                "straggler",
                step=progress.step,
                rank=slow.rank,
                cause=f"{slow.seconds:.3f} s of its own a step, {slow.score:.2f} times its peers'",
                action="reported",
            )
        for trouble in self._stores.compare():
            self._journal.event("store", step=progress.step, rank=None, **dataclasses.asdict(trouble))
