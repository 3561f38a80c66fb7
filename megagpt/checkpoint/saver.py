"""The checkpoints of a run that trains: which one it continues from, when it saves, and what a save says beside
tensors.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagpt import __version__
from megagpt.checkpoint import lineage
from megagpt.checkpoint.background import BackgroundSave, Failed, HostCopy, Snapshot
from megagpt.checkpoint.folders import Folder, checkpoints_of
from megagpt.checkpoint.interval import best_interval
from megagpt.checkpoint.lineage import Commit
from megagpt.checkpoint.load import Manifest, check_model, load_checked, newest_valid, proven, read_manifest
from megagpt.checkpoint.local import LocalCopies, LocalSave
from megagpt.checkpoint.save import KINDS, bytes_of, save
from megagpt.config import Checkpoint, Run, sequences_of, to_toml
from megagpt.data import order
from megagpt.data.corpus import Corpus
from megagpt.data.order import Cursor
from megagpt.data.pack import source
from megagpt.errors import UserError
from megagpt.parallel import ranks

if TYPE_CHECKING:
    from megagpt.parallel.engine import Engine
    from megagpt.parallel.state import Slice
    from megagpt.report.journal import Journal


@dataclasses.dataclass
class Progress:
    """Where the run stands."""

    step: int
    """Steps done."""
    cursor: Cursor
    """Sequences consumed, and the order they come in."""
    health: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What heal.health keeps of the steps before."""

    def tokens(self, context: int) -> int:
        return self.cursor.consumed * context


class Saver:
    """The checkpoints of one attempt at a run."""

    def __init__(self, run: Run, out: Path, engine: Engine) -> None:
        self.root = checkpoints_of(run.checkpoint, out)
        self._run = run
        self._engine = engine
        self._generation = 0
        self._copy, self._local_copy = HostCopy(), HostCopy()
        self._pending: _Pending | None = None
        self._pace = _Pace(run.checkpoint)
        self._evaluated: tuple[int, float | None] | None = None
        local, mesh = run.checkpoint.local, engine.mesh
        self._local = LocalCopies(local, out, rank=mesh.rank, ranks=mesh.world_size) if local else None
        self._local_pending: tuple[int, LocalSave] | None = None

    def resume(self, corpora: list[Corpus], journal: Journal, *, before: int | None = None) -> Progress:
        """Load the newest undamaged state, if there is one, and begin a new attempt from it.

        With `before` it is the newest checkpoint of a step before that one, and has to be there.
        """
        self.finish(journal)
        found = self._load_local(journal) if before is None else None
        commit, header = found or self._load(journal, before)
        step, cursor, health = 0, None, {}
        if header is not None:
            self._engine.restored(header["counters"])
            step, cursor, health = header["step"], header["cursor"], header.get("health", {})
        generation = lineage.begin(self.root, commit) if self._engine.mesh.rank == 0 else 0
        self._generation = -ranks.lowest_over_ranks(-generation)
        self._pace.begin(step)
        return Progress(step, _cursor(self._run, corpora, cursor), health)

    def _load(self, journal: Journal, before: int | None) -> tuple[Commit | None, dict[str, Any] | None]:
        """Load the newest undamaged checkpoint: where it is, and the run's state."""
        mesh, engine = self._engine.mesh, self._engine
        held = engine.held()

        def read(manifest: Manifest) -> str | None:
            check_model(manifest, engine.shapes())
            return load_checked(manifest, held, rank=mesh.rank, ranks=mesh.world_size)

        manifest, faults = newest_valid(self.root, rank=mesh.rank, ranks=mesh.world_size, before=before, read=read)
        for fault in faults:
            journal.warn(f"{fault}; an older checkpoint is used, and the steps since are computed again.")
        if manifest is None:
            return None, None
        proof = "proven equal" if proven(manifest, engine.checksums(KINDS)) else "not proven: no checksums"
        total = len(manifest.shapes)
        journal.note(f"loaded {manifest.commit}: {total} of {total} tensors, 0 defaulted; {proof}")
        return manifest.commit, manifest.header

    def _load_local(self, journal: Journal) -> tuple[Commit, dict[str, Any]] | None:
        """Load the nodes' own copies, if they are no older than the checkpoints: where they are, and the state."""
        if self._local is None:
            return None
        if self._local.nodes == 1:
            journal.warn("checkpoint.local keeps no second copy, since all ranks are on one node.")
        found = self._local.load(self._engine.held(), self.root)
        if found is not None:
            journal.note(f"loaded the nodes' own copies of step {found[0].step:,}, {found[0]}")
        return found

    def has_before(self, step: int) -> bool:
        """Whether the run has a checkpoint of a step before `step`: rank 0 looks. Every rank must call it."""
        found = self._engine.mesh.rank > 0 or any(commit.step < step for commit in lineage.commits(self.root))
        return bool(ranks.lowest_over_ranks(int(found)))

    def evaluated(self, step: int, loss: float | None) -> None:
        """The loss on held-out text after `step`, for checkpoint.keep_best."""
        self._evaluated = (step, loss)

    def due(self, step: int, journal: Journal) -> bool:
        """Whether `step`, just done, is one to save at. Every rank must call it after every step: here what threads
        have written is committed. A checkpoint that failed raises UserError on all ranks.
        """
        if self._pending is not None and self._pending.work.settle():
            self._committed(journal)
        self._settle_local(journal)
        return self._pace.due(step)

    def save(self, progress: Progress, journal: Journal) -> None:
        """Save the run as it stands: wait for the commit, or with checkpoint.asynchronous only for the copy."""
        began = time.perf_counter()
        self._finish_checkpoint(journal)
        mesh = self._engine.mesh
        journal.sync()
        folder = lineage.commit_folder(self.root, self._generation, progress.step)
        arguments: dict[str, Any] = {"header": self._header(progress), "rank": mesh.rank, "ranks": mesh.world_size}
        if not self._run.checkpoint.asynchronous:
            save(folder, self._engine.owned(), **arguments)
            self._retain()
            journal.saved(progress.step, folder, seconds=time.perf_counter() - began)
            self._pace.saved(progress.step, took=time.perf_counter() - began)
            self._pace.costs(time.perf_counter() - began)
        else:
            owned = self._engine.owned()
            if not self._copy.bytes():
                _tell_memory("saving in the background", owned, journal)
            work = BackgroundSave(folder, owned, self._copy, **arguments)
            self._engine.before_next_update(work.copied.wait)
            self._pending = _Pending(progress.step, began, work)
            self._pace.saved(progress.step, took=time.perf_counter() - began)

    def local_due(self, step: int) -> bool:
        """Whether the nodes are to keep copies of their own of `step`, just done."""
        return self._local is not None and step % self._run.checkpoint.local_every == 0

    def save_locally(self, progress: Progress, journal: Journal) -> None:
        """Have the nodes keep copies of the run as it stands. That they cannot is told, and no more."""
        assert self._local is not None
        self._finish_local(journal)
        journal.sync()
        held, header = self._engine.held(), self._header(progress)
        begin = partial(self._local.begin, header=header, generation=self._generation, step=progress.step)
        if not self._run.checkpoint.asynchronous:
            self._local_pending = (progress.step, begin(lambda: held))
            self._finish_local(journal)
        else:
            if not self._local_copy.bytes():
                _tell_memory("keeping copies on the nodes in the background", held, journal)
            snapshot = Snapshot(held, self._local_copy)
            self._local_pending = (progress.step, begin(snapshot.take))
            self._engine.before_next_update(snapshot.wait)

    def finish(self, journal: Journal) -> None:
        """Wait for the saves in progress, if there are any. To be called before the run ends."""
        self._finish_checkpoint(journal)
        self._finish_local(journal)

    def _finish_checkpoint(self, journal: Journal) -> None:
        if self._pending is not None:
            self._pending.work.finish()
            self._committed(journal)

    def _finish_local(self, journal: Journal) -> None:
        while self._local_pending is not None:
            self._local_pending[1].wait()
            self._settle_local(journal)

    def _settle_local(self, journal: Journal) -> None:
        """Go on with the nodes' copies that are being made, if all ranks can. A failure is told, and no more."""
        if self._local_pending is None:
            return
        step, work = self._local_pending
        try:
            over = work.settle()
        except Failed as failure:
            words = f"the nodes keep no copies of step {step:,}: {failure}."
            journal.warn(words)
            if failure.here and self._engine.mesh.rank > 0:  # whose journal is silent
                print(f"megagpt: warning: {words}", file=sys.stderr, flush=True)
            over = True
        if over:
            self._local_pending = None

    def _committed(self, journal: Journal) -> None:
        assert self._pending is not None
        pending, self._pending = self._pending, None
        self._retain()
        seconds = time.perf_counter() - pending.began
        journal.saved(pending.step, pending.work.folder, seconds=seconds)
        self._pace.costs(pending.work.copied.seconds)

    def _retain(self) -> None:
        """Delete what retention does not keep."""
        if self._engine.mesh.rank == 0:
            rules = self._run.checkpoint
            lineage.retain(self.root, keep=rules.keep, always=_kept_for_ever(self.root, rules))

    def _header(self, progress: Progress) -> dict[str, Any]:
        mesh = self._engine.mesh
        evaluated = self._evaluated
        return {
            "megagpt": __version__,
            "step": progress.step,
            "tokens": progress.tokens(self._run.model.context),
            "cursor": progress.cursor.to_dict(),
            "counters": self._engine.counters(),
            "health": progress.health,
            "evaluation_loss": evaluated[1] if evaluated and evaluated[0] == progress.step else None,
            "mesh": {"data": mesh.data, "pipeline": mesh.pipeline, "tensor": mesh.tensor},
            "run": to_toml(self._run),
        }


def _tell_memory(what: str, state: Sequence[Slice], journal: Journal) -> None:
    journal.note(f"{what} takes {bytes_of(state) / 2**30:,.2f} GiB of this rank's host memory")


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A save in the background."""

    step: int
    began: float
    work: BackgroundSave


class _Pace:
    """When to save: every so many steps, or as Young and Daly advise for what steps and saves were seen to take."""

    def __init__(self, settings: Checkpoint) -> None:
        self._settings = settings
        self._every = settings.every
        self._last, self._since = 0, 0.0
        self._step_seconds = 0.0

    def begin(self, step: int) -> None:
        self._last, self._since = step, time.perf_counter()

    def due(self, step: int) -> bool:
        if not self._settings.mtbf_hours:
            return self._every > 0 and step % self._every == 0
        return self._every > 0 and step >= self._last + self._every

    def saved(self, step: int, *, took: float) -> None:
        """A save after `step` was made or begun, and training stood still for `took` seconds."""
        if step > self._last:
            self._step_seconds = (time.perf_counter() - self._since - took) / (step - self._last)
        self.begin(step)

    def costs(self, seconds: float) -> None:
        """What a save costs training: all of it, or in the background the copy, which takes memory's bandwidth.

        The slowest rank decides for all. Every rank must call it.
        """
        if self._settings.mtbf_hours and self._step_seconds:
            best = best_interval(save_seconds=seconds, mtbf_seconds=self._settings.mtbf_hours * 3600)
            self._every = ranks.lowest_over_ranks(max(1, round(best / self._step_seconds)))


def _kept_for_ever(root: Folder, rules: Checkpoint) -> set[int]:
    """The steps whose checkpoints stay because of their number or of their loss on held-out text."""
    found = list(lineage.commits(root))
    steps = {commit.step for commit in found if rules.keep_every and commit.step % rules.keep_every == 0}
    if rules.keep_best:
        scored: list[tuple[float, int]] = []
        for commit in found:
            try:
                loss = read_manifest(commit).header.get("evaluation_loss")
            except UserError:
                continue  # damaged since: a load will say so
            if loss is not None:
                scored.append((loss, commit.step))
        steps |= {step for _, step in sorted(scored)[: rules.keep_best]}
    return steps


def _cursor(run: Run, corpora: list[Corpus], saved: dict[str, Any] | None) -> Cursor:
    """Where the run stands in its data, with the mixture that it has now; without a saved cursor, at the beginning."""
    cursor = beginning(run, corpora)
    if saved is not None:
        mixture = dict(zip(cursor.sources, cursor.segments[0].weights, strict=True))
        cursor = _same_stream(Cursor.from_dict(saved), run).with_mixture(mixture)
    cursor = dataclasses.replace(cursor, max_epochs=run.data.max_epochs)
    cursor.check_repetition(sequences_of(run))
    return cursor


def beginning(run: Run, corpora: Sequence[Corpus]) -> Cursor:
    """The place in its data of a run that has read nothing of its `corpora`, those of its mixture."""
    context, packing, window = run.model.context, run.data.packing, run.data.window
    sources = [source(corpus, context=context, packing=packing, windowed=window is not None) for corpus in corpora]
    weights = dict(zip(sources, run.data.mixture.values(), strict=True))
    return order.start(seed=run.seed, context=context, packing=packing, weights=weights, window=window)


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
