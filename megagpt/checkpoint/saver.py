"""The checkpoints of a run that trains: which one it continues from, and what a new one says beside tensors."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagpt import __version__
from megagpt.checkpoint import lineage
from megagpt.checkpoint.load import check_model, load, newest_valid
from megagpt.checkpoint.save import save
from megagpt.config import Run, sequences_of, to_toml
from megagpt.data import order
from megagpt.data.corpus import Corpus
from megagpt.data.order import Cursor
from megagpt.data.pack import source
from megagpt.errors import UserError
from megagpt.parallel import ranks

if TYPE_CHECKING:
    from megagpt.parallel.engine import Engine
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
        self.root = out / "checkpoints"
        self._run = run
        self._engine = engine
        self._generation = 0

    def resume(self, corpora: list[Corpus], journal: Journal, *, before: int | None = None) -> Progress:
        """Load the newest undamaged checkpoint, if there is one, and begin a new attempt from it.

        With `before` it is the newest of a step before that one, and has to be there.
        """
        mesh, run = self._engine.mesh, self._run
        manifest, faults = newest_valid(self.root, rank=mesh.rank, ranks=mesh.world_size, before=before)
        for fault in faults:
            journal.warn(f"{fault}; an older checkpoint is used, and the steps since are computed again.")
        step, cursor, health = 0, None, {}
        if manifest is not None:
            check_model(manifest, self._engine.shapes())
            load(manifest, self._engine.held())
            self._engine.restored(manifest.header["counters"])
            step, cursor = manifest.header["step"], manifest.header["cursor"]
            health = manifest.header.get("health", {})
        generation = lineage.begin(self.root, manifest.commit if manifest else None) if mesh.rank == 0 else 0
        self._generation = -ranks.lowest_over_ranks(-generation)
        return Progress(step, _cursor(run, corpora, cursor), health)

    def has_before(self, step: int) -> bool:
        """Whether the run has a checkpoint of a step before `step`: rank 0 looks. Every rank must call it."""
        found = self._engine.mesh.rank > 0 or any(commit.step < step for commit in lineage.commits(self.root))
        return bool(ranks.lowest_over_ranks(int(found)))

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
            "health": progress.health,
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
