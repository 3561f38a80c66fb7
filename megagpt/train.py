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
import dataclasses
import itertools
import math
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from megagpt import __version__
from megagpt.checkpoint import lineage
from megagpt.checkpoint.load import check_model, load, newest_valid
from megagpt.checkpoint.save import save
from megagpt.config import Run, sequences_of, steps_of, to_toml
from megagpt.data import order
from megagpt.data.batch import Batch, document_lengths
from megagpt.data.corpus import Corpus, open_mixture
from megagpt.data.loader import train_batches
from megagpt.data.order import Cursor
from megagpt.data.pack import source
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


@dataclasses.dataclass
class Progress:
    """Where the run stands."""

    step: int
    """Steps done."""
    cursor: Cursor
    """Sequences consumed, and the order they come in."""

    def tokens(self, context: int) -> int:
        return self.cursor.consumed * context


def fit(run: Run, out: Path) -> None:
    """Train `run` in the folder `out` until it is done or told to stop, on this rank. Every rank must call it.

    Raises UserError if the folder holds another model, no usable checkpoint, or if the loss is no longer a number.
    """
    ranks.join(world=run.parallel.world_size())
    mesh = mesh_of(run.parallel, ranks.rank())
    corpora = open_mixture(run.data.mixture, run.data)
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
                _refuse_divergence(done, progress.step, saver.root)
                stopping = ranks.lowest_over_ranks(-int(stop.asked)) < 0
                last = progress.step == total
                if last or _due(progress.step, run.train.eval_every):
                    evaluate(run, engine, progress, corpora, journal)
                if last or stopping or _due(progress.step, run.checkpoint.every):
                    saver.save(progress, journal)
                if stopping:
                    break
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


def _refuse_divergence(done: Step, step: int, root: Path) -> None:
    if not math.isfinite(done.loss + done.grad_norm) and not done.skipped:
        raise UserError(
            f"step {step:,} has loss {done.loss:g} and gradient norm {done.grad_norm:g}: the run has diverged.",
            f"Checkpoints under {root} are from before; continue with a lower optim.lr.",
        )


def evaluate(run: Run, engine: Engine, progress: Progress, corpora: list[Corpus], journal: Journal) -> None:
    """The loss on held-out documents of every corpus."""
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
            reads=engine.mesh.reads_data,
        )
        journal.evaluation(result, step=progress.step, tokens=progress.tokens(run.model.context))


class Saver:
    """The checkpoints of one attempt at a run."""

    def __init__(self, run: Run, out: Path, engine: Engine) -> None:
        self.root = out / "checkpoints"
        self._run = run
        self._engine = engine
        self._generation = 0

    def resume(self, corpora: list[Corpus], journal: Journal) -> Progress:
        """Load the newest undamaged checkpoint, if there is one, and begin a new attempt from it."""
        mesh, run = self._engine.mesh, self._run
        manifest, faults = newest_valid(self.root, rank=mesh.rank, ranks=mesh.world_size)
        for fault in faults:
            journal.warn(f"{fault}; an older checkpoint is used, and the steps since are computed again.")
        step, cursor = 0, None
        if manifest is not None:
            check_model(manifest, self._engine.shapes())
            load(manifest, self._engine.held())
            self._engine.restored(manifest.header["counters"])
            step, cursor = manifest.header["step"], manifest.header["cursor"]
        generation = lineage.begin(self.root, manifest.commit if manifest else None) if mesh.rank == 0 else 0
        self._generation = -ranks.lowest_over_ranks(-generation)
        return Progress(step, _cursor(run, corpora, cursor))

    def save(self, progress: Progress, journal: Journal) -> None:
        """Commit the run as it stands, then delete what retention does not keep."""
        began = time.perf_counter()
        mesh = self._engine.mesh
        journal.sync()
        folder = lineage.commit_folder(self.root, self._generation, progress.step)
        save(folder, self._engine.owned(), header=self._header(progress), rank=mesh.rank, ranks=mesh.world_size)
        if mesh.rank == 0:
            lineage.retain(self.root, self._run.checkpoint.keep)
        journal.saved(progress.step, folder, seconds=time.perf_counter() - began)

    def _header(self, progress: Progress) -> dict[str, Any]:
        mesh = self._engine.mesh
        return {
            "megagpt": __version__,
            "step": progress.step,
            "tokens": progress.tokens(self._run.model.context),
            "cursor": progress.cursor.to_dict(),
            "counters": self._engine.counters(),
            "mesh": {"data": mesh.data, "pipeline": mesh.pipeline, "tensor": mesh.tensor},
            "run": to_toml(self._run),
        }


def _cursor(run: Run, corpora: list[Corpus], saved: dict[str, Any] | None) -> Cursor:
    """Where the run stands in its data, with the mixture that it has now; without a saved cursor, at the beginning."""
    context, packing = run.model.context, run.data.packing
    window = run.data.window
    sources = [source(corpus, context=context, packing=packing, windowed=window is not None) for corpus in corpora]
    weights = dict(zip(sources, run.data.mixture.values(), strict=True))
    if saved is None:
        cursor = order.start(seed=run.seed, context=context, packing=packing, weights=weights, window=window)
    else:
        cursor = _same_stream(Cursor.from_dict(saved), run).with_mixture(weights)
    cursor = dataclasses.replace(cursor, max_epochs=run.data.max_epochs)
    cursor.check_repetition(sequences_of(run))
    return cursor


def _same_stream(cursor: Cursor, run: Run) -> Cursor:
    """Refuse settings that would make another stream of a run that has begun, where its place means nothing."""
    settings = {
        "seed": (cursor.seed, run.seed),
        "model.context": (cursor.context, run.model.context),
        "data.packing": (cursor.packing, run.data.packing),
        "data.window": (cursor.window, run.data.window),
    }
    for name, (was, now) in settings.items():
        if was != now:
            raise UserError(
                f"{name} = {now} differs from the {was} that the run began with, and decides what it has read.",
                f"Continue with --{name} {was}, or start a new run with another --out.",
            )
    return cursor


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
