"""The training loop of one rank: start reading here.

    fit        join the other ranks, build the engine, find where the run stood, then for every step:
                   step: take its micro-batches; forward, backward and update in the engine; write the record
                   look at the run's health, and go back to a checkpoint if the loss spiked
                   evaluate, save, and stop when all is done or when asked to
A run is its folder: run.toml, metrics.jsonl, evaluations.jsonl, events.jsonl, checkpoints/. Started again on the same
folder it continues from the newest checkpoint, to the exact token; the losses go on bit for bit on the same layout,
since nothing depends on a generator's state: data order, initial weights and dropout are functions of the seed.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from megagpt import outcome, stop
from megagpt.checkpoint.saver import Progress, Saver
from megagpt.config import Run, steps_of
from megagpt.data.batch import Batch, document_lengths
from megagpt.data.corpus import Corpus, open_mixture
from megagpt.data.fetch import BadBlock
from megagpt.data.loader import train_batches
from megagpt.evaluate import evaluate_corpus
from megagpt.heal.bad_blocks import lost_a_block
from megagpt.heal.clock import Clock
from megagpt.heal.corruption import train_twice
from megagpt.heal.goodput import goodput
from megagpt.heal.healer import Healer, watched
from megagpt.kernels.tuning import check_ranks_agree
from megagpt.mesh import mesh_of
from megagpt.parallel import ranks
from megagpt.parallel.engine import Engine, Step
from megagpt.report.goodput import goodput_lines
from megagpt.report.journal import Journal
from megagpt.schedule import learning_rate


def fit(run: Run, out: Path, *, began: float | None = None) -> None:
    """Train `run` in the folder `out` until it is done or told to stop, on this rank. Every rank must call it.

    `began`: when the command did, in seconds since 1970; else now. Raises UserError if the folder holds another model
    or no usable checkpoint, and RunFailure if the run cannot go on: it diverged, or a device computes wrongly.
    """
    clock = Clock(time.time() if began is None else began)
    ranks.join(world=run.parallel.world_size())
    mesh = mesh_of(run.parallel, ranks.rank())
    with watched(run, out, mesh, clock) as watchdog, stop.StopSignal(out if mesh.rank == 0 else None) as wish:
        corpora = open_mixture(run.data.mixture, run.data)
        engine = Engine(run, mesh)
        if engine.device.type == "cuda":
            check_ranks_agree(engine.device)
        saver = Saver(run, out, engine)
        with Journal(run, out, engine.device, speak=mesh.rank == 0) as journal, Feed(run, corpora, engine) as feed:
            progress = saver.resume(corpora, journal)
            journal.open(step=progress.step, tokens=progress.tokens(run.model.context))
            feed.start(progress)
            healer = Healer(run, saver, corpora, journal, clock, progress)
            total, stopping = steps_of(run), 0
            while progress.step < total and not stopping:
                lost = progress.cursor.lost
                done = step(run, engine, progress, feed, journal, clock)
                back = healer.examine(done, progress)
                if back is not None:
                    progress = back
                    feed.start(progress)
                    continue
                healer.compare_ranks(engine, progress, feed.waited)
                stopping = -ranks.lowest_over_ranks(-wish.code())
                last = progress.step == total
                if last or _due(progress.step, run.train.eval_every):
                    clock.enter("evaluation", progress.step)
                    saver.evaluated(progress.step, evaluate(run, engine, progress, corpora, journal))
                due = saver.due(progress.step, journal) or progress.cursor.lost != lost
                if last or stopping or due:
                    clock.enter("save", progress.step)
                    saver.save(progress, journal)
                elif saver.local_due(progress.step):
                    clock.enter("save", progress.step)
                    saver.save_locally(progress, journal)
            saver.finish(journal)
            watchdog.ending = "finished" if progress.step >= total else "stopped"
            journal.ended(progress.step, finished=progress.step >= total)
            if mesh.rank == 0:
                _tell_outcome(out, "done" if progress.step >= total else stop.CAUSES[stopping - 1], progress.step)
    if mesh.rank == 0 and (split := goodput(out, mtbf_hours=run.checkpoint.mtbf_hours)) is not None:
        print("\n".join(goodput_lines(split)))


def _tell_outcome(out: Path, cause: outcome.Cause, step: int) -> None:
    """Leave word that the run is saved, and why it ended; the wish to stop, if there was one, is fulfilled."""
    word = outcome.ended("finished" if cause == "done" else "stopped", cause, rank=0, step=step)
    outcome.write_rank(outcome.attempt_folder(out), word)
    stop.forget(out)


def step(run: Run, engine: Engine, progress: Progress, feed: Feed, journal: Journal, clock: Clock) -> Step:
    """One optimizer step: the next micro-batches, the engine, the record."""
    clock.enter("data", progress.step + 1)
    began = time.perf_counter()
    size = run.train.batch_at(progress.tokens(run.model.context))
    micro_batches = feed.take(progress, size, journal)
    clock.enter(clock.computing(progress.step + 1), progress.step + 1)
    context = run.model.context
    tokens = progress.tokens(context) + size * context
    lr = learning_rate(run.optim, tokens=tokens, total_tokens=run.train.tokens)
    if _due(progress.step, run.train.guard_every):
        engine.check_agreement(micro_batches)
    train = train_twice if _due(progress.step, run.heal.recompute_every) else Engine.train_batch
    done = train(engine, micro_batches, lr=lr, count=size // (run.train.micro_batch * engine.mesh.data))
    progress.step += 1
    progress.cursor = progress.cursor.advanced(size)
    seconds = time.perf_counter() - began
    journal.step(
        done,
        step=progress.step,
        tokens=tokens,
        sequences=size,
        lr=lr,
        seconds=seconds,
        waited=feed.waited,
        documents=document_lengths(micro_batches),
    )
    return done


def evaluate(run: Run, engine: Engine, progress: Progress, corpora: list[Corpus], journal: Journal) -> float | None:
    """The loss on held-out documents of every corpus that has any; returns their mean."""
    losses = []
    for corpus in filter(Corpus.has_heldout, corpora):
        result = evaluate_corpus(
            engine.eval_batch,
            corpus,
            sequences=run.train.eval_sequences,
            context=run.model.context,
            micro_batch=run.train.micro_batch,
            data=run.data,
            data_rank=engine.mesh.data_rank,
            data_ranks=engine.mesh.data,
            counts=engine.mesh.reports,
            reads=engine.mesh.reads_data,
        )
        journal.evaluation(result, step=progress.step, tokens=progress.tokens(run.model.context))
        losses.append(result.loss)
    return sum(losses) / len(losses) if losses else None


class Feed:
    """The replica's micro-batches of each step, read ahead by a thread; none between the first and the last stage."""

    def __init__(self, run: Run, corpora: list[Corpus], engine: Engine) -> None:
        self._run, self._corpora, self._engine = run, corpora, engine
        self._open = contextlib.ExitStack()
        self._batches: Iterator[list[Batch]] = iter(())
        self._substitutes = run.data.bad_block == "substitute" and any(corpus.remote for corpus in corpora)
        self.waited = 0.0
        """Seconds that the last step's micro-batches took to come."""

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def take(self, progress: Progress, size: int, journal: Journal) -> list[Batch]:
        """The micro-batches of the next step, of `size` sequences. A block may be lost by it (heal.bad_blocks)."""
        began = time.perf_counter()
        batches, broken = self._next()
        while self._substitutes and lost_a_block(broken, progress, self._corpora, size, journal):
            self.start(progress)
            batches, broken = self._next()
        self.waited = time.perf_counter() - began
        return batches

    def _next(self) -> tuple[list[Batch], BadBlock | None]:
        try:
            return next(self._batches), None
        except BadBlock as error:
            if not self._substitutes:
                raise
            return [], error

    def start(self, progress: Progress) -> None:
        """Go on from where the run stands, whatever was read ahead."""
        self._open.close()
        run, engine, context = self._run, self._engine, self._run.model.context
        if not engine.mesh.reads_data:
            self._batches = ([] for _ in itertools.repeat(None))
            return
        batches = train_batches(
            self._corpora,
            progress.cursor,
            global_batch=lambda consumed: run.train.batch_at(consumed * context),
            micro_batch=run.train.micro_batch,
            data_rank=engine.mesh.data_rank,
            data_ranks=engine.mesh.data,
            document_mask=run.data.document_mask,
            prefetch=run.data.prefetch,
            pin=engine.device.type == "cuda",
        )
        self._batches = self._open.enter_context(contextlib.closing(batches))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
