"""The training loop of one rank: start reading here.

    fit        join the other ranks, build the engine, find where the run stood, then for every step:
                   take the step's micro-batches from the loader
                   step: forward, backward and update in the engine; write the record
                   evaluate, save, and stop when all is done or when asked to
A run is its folder: run.toml, metrics.jsonl, evaluations.jsonl, events.jsonl, checkpoints/. Started again on the same
folder it continues from the newest checkpoint, to the exact token; the losses go on bit for bit on the same layout,
since nothing depends on a generator's state: data order, initial weights and dropout are functions of the seed.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Generator, Iterator
from pathlib import Path

from megagpt.checkpoint.saver import Progress, Saver
from megagpt.config import Run, steps_of
from megagpt.data.batch import Batch, document_lengths
from megagpt.data.corpus import Corpus, open_mixture
from megagpt.data.loader import train_batches
from megagpt.data.prefetch import Prefetched
from megagpt.errors import UserError
from megagpt.evaluate import evaluate_corpus
from megagpt.kernels.tuning import check_ranks_agree
from megagpt.mesh import mesh_of
from megagpt.parallel import ranks
from megagpt.parallel.engine import Engine, Step
from megagpt.report.journal import Journal
from megagpt.schedule import learning_rate
from megagpt.stop import StopSignal


def fit(run: Run, out: Path) -> None:
    """Train `run` in the folder `out` until it is done or told to stop, on this rank. Every rank must call it.

    Raises UserError if the folder holds another model, no usable checkpoint, or if the loss is no longer a number.
    """
    ranks.join(world=run.parallel.world_size())
    mesh = mesh_of(run.parallel, ranks.rank())
    corpora = open_mixture(run.data.mixture)
    engine = Engine(run, mesh)
    if engine.device.type == "cuda":
        check_ranks_agree(engine.device)
    saver = Saver(run, out, engine)
    with Journal(run, out, engine.device, speak=mesh.rank == 0) as journal, StopSignal() as stop:
        progress = saver.resume(corpora, journal)
        journal.open(step=progress.step, tokens=progress.tokens(run.model.context))
        total = steps_of(run)
        with contextlib.closing(_batches(run, corpora, progress, engine)) as batches:
            while progress.step < total:
                done = step(run, engine, progress, batches, journal)
                _refuse_divergence(done, progress.step, str(saver.root))
                stopping = ranks.lowest_over_ranks(-int(stop.asked)) < 0
                last = progress.step == total
                if last or _due(progress.step, run.train.eval_every):
                    saver.evaluated(progress.step, evaluate(run, engine, progress, corpora, journal))
                due = saver.due(progress.step, journal)
                if last or stopping or due:
                    saver.save(progress, journal)
                if stopping:
                    break
        saver.finish(journal)
        journal.ended(progress.step, finished=progress.step >= total)


def step(run: Run, engine: Engine, progress: Progress, batches: Iterator[list[Batch]], journal: Journal) -> Step:
    """One optimizer step: the next micro-batches, the engine, the record."""
    began = time.perf_counter()
    micro_batches = next(batches)
    waited = time.perf_counter() - began
    context = run.model.context
    size = run.train.batch_at(progress.tokens(context))
    tokens = progress.tokens(context) + size * context
    lr = learning_rate(run.optim, tokens=tokens, total_tokens=run.train.tokens)
    if _due(progress.step, run.train.guard_every):
        engine.check_agreement(micro_batches)
    done = engine.train_batch(micro_batches, lr=lr, count=size // (run.train.micro_batch * engine.mesh.data))
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
        waited=waited,
        documents=document_lengths(micro_batches),
    )
    return done


def _refuse_divergence(done: Step, step: int, root: str) -> None:
    if not math.isfinite(done.loss + done.grad_norm) and not done.skipped:
        raise UserError(
            f"step {step:,} has loss {done.loss:g} and gradient norm {done.grad_norm:g}: the run has diverged.",
            f"Checkpoints under {root} are from before; continue with a lower optim.lr.",
        )


def evaluate(run: Run, engine: Engine, progress: Progress, corpora: list[Corpus], journal: Journal) -> float:
    """Record the loss on held-out documents of every corpus; returns their mean."""
    losses = []
    for corpus in corpora:
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
        )
        journal.evaluation(result, step=progress.step, tokens=progress.tokens(run.model.context))
        losses.append(result.loss)
    return sum(losses) / len(losses)


def _batches(
    run: Run, corpora: list[Corpus], progress: Progress, engine: Engine
) -> Prefetched[list[Batch]] | Generator[list[Batch], None, None]:
    """The replica's micro-batches of each step; none on a rank between the first and the last stage."""
    if not engine.mesh.reads_data:
        return ([] for _ in itertools.repeat(None))
    context = run.model.context
    return train_batches(
        corpora,
        progress.cursor,
        global_batch=lambda consumed: run.train.batch_at(consumed * context),
        micro_batch=run.train.micro_batch,
        data_rank=engine.mesh.data_rank,
        data_ranks=engine.mesh.data,
        document_mask=run.data.document_mask,
        prefetch=run.data.prefetch,
        pin=engine.device.type == "cuda",
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
