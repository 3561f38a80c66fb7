"""`megagpt train`: check everything, prepare the run's folder, and train."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt import config
from megagpt.checks import check_world, checked, costs_of
from megagpt.errors import UserError
from megagpt.files import whole


@dataclass(frozen=True, kw_only=True)
class Train(config.Run):
    """Train, or continue. Settings are spelled as in the preset: --optim.lr 2e-4 --parallel.data 8."""

    out: Path = Path()
    """Folder of the run; if it holds this run already, training goes on from its newest checkpoint."""
    dry_run: bool = False
    """Check everything, print the plan, and stop."""


def train_defaults(preset: str) -> Train:
    """The options of `megagpt train PRESET` before any flag."""
    run = config.load(preset)
    path = Path(preset)
    name = path.parent.name if path.name == "run.toml" else path.name.removesuffix(".toml")
    return Train(**_fields(run), out=Path("runs") / (name or "run"))


def run_train(options: Train, *, preset: str = "") -> int:
    """Train on the ranks of a launcher, or on local ones started here; then, there, write samples and the report."""
    from megagpt.parallel import launcher, ranks

    launcher.adopt_slurm()
    began = time.time()
    run = checked(config.Run(**_fields(options)))
    if launcher.launched():
        check_world(run, ranks.world_size())
    if ranks.rank() == 0:
        for cost in costs_of(run):
            print(f"megagpt: warning: {cost}", file=sys.stderr)
    if preset == "quickstart":
        ensure_quickstart_corpora(run)
    prepare(run, options.out, write=not options.dry_run and ranks.rank() == 0)
    if options.dry_run:
        show_plan(run, options.out)
        return 0
    if launcher.launched():
        ranks.run_launched(lambda: _fit(run, options.out, began), options.out)
    status = ranks.run_local(lambda: _fit(run, options.out, began), run.parallel.world_size(), options.out)
    if status == 0:
        finish(run, options.out)
    return status


def show_plan(run: config.Run, out: Path) -> None:
    """Print what the run would do."""
    from megagpt.report.console import plan_lines
    from megagpt.report.plan import plan_rows

    print("\n".join([str(out), *plan_lines(plan_rows(run))]))


def finish(run: config.Run, out: Path) -> None:
    """Sample a few texts from the newest checkpoint, and write the report."""
    from megagpt.commands.generate import write_samples
    from megagpt.report.html import write_report

    if run.report.samples:
        write_samples(out, run.report.samples)
    print(f"report: {write_report(out)}")


def ensure_quickstart_corpora(run: config.Run) -> None:
    """The quickstart reads the demo's corpora; whoever has not run the demo gets them now."""
    from megagpt.commands.demo import build_corpora
    from megagpt.data.store import is_url

    missing = [
        Path(folder)
        for folder in run.data.mixture
        if not is_url(folder) and not Path(folder, "manifest.json").exists()
    ]
    if missing:
        build_corpora(missing[0].parent, vocabulary=run.model.vocabulary)


def _fields(tree: config.Run) -> dict[str, Any]:
    """The sections of a run, by name."""
    return {spec.name: getattr(tree, spec.name) for spec in dataclasses.fields(config.Run)}


def _fit(run: config.Run, out: Path, began: float) -> None:
    from megagpt.train import fit

    fit(run, out, began=began)


def prepare(run: config.Run, out: Path, *, write: bool) -> None:
    """Everything that can be refused before a rank starts; then, with `write`, the run's folder with run.toml in it.

    Raises UserError for a missing logger's package, a corpus that is missing, damaged, of another tokenizer, of too
    large a vocabulary or without documents to evaluate on, a folder whose checkpoint is of another model, and one that
    cannot be written or has no room.
    """
    from megagpt.data.corpus import open_mixture
    from megagpt.report.loggers import require_packages

    require_packages(run.report)
    corpora = open_mixture(run.data.mixture, run.data)
    first = corpora[0]
    for corpus in corpora if run.train.eval_every else ():
        if not corpus.has_heldout():
            raise UserError(
                f"train.eval_every = {run.train.eval_every} evaluates on held-out documents, and "
                f"{corpus.location} has none.",
                "Build it with a larger --heldout, or use --train.eval_every 0.",
            )
    if first.manifest.vocabulary > run.model.vocabulary:
        raise UserError(
            f"model.vocabulary = {run.model.vocabulary:,} is less than the {first.manifest.vocabulary:,} tokens of "
            f"the tokenizer of {first.location}.",
            f"Use --model.vocabulary {-(-first.manifest.vocabulary // 64) * 64}.",
        )
    _refuse_other_model(run, out)
    if write:
        try:
            out.mkdir(parents=True, exist_ok=True)
            with whole(out / "tokenizer.json") as temporary:
                shutil.copyfile(first.folder / "tokenizer.json", temporary)
        except OSError as error:
            raise UserError(f"the run's folder {out} cannot be written: {error}.", "Choose another --out.") from error
        _require_room(run, out)


def _require_room(run: config.Run, out: Path) -> None:
    """Refuse a place for checkpoints that is read-only, or too full for one of them."""
    from megagpt import ledger
    from megagpt.checkpoint.folders import checkpoints_of

    folder = checkpoints_of(run.checkpoint, out)
    folder.require_writable()
    folder.require_space(ledger.checkpoint_bytes(run.model))


def _refuse_other_model(run: config.Run, out: Path) -> None:
    """Compare shapes with the folder's newest checkpoint, on torch's meta device."""
    from megagpt.checkpoint.folders import checkpoints_of
    from megagpt.checkpoint.lineage import commits

    newest = next(commits(checkpoints_of(run.checkpoint, out)), None)
    if newest is None:
        return
    import torch

    from megagpt.checkpoint.load import check_model, read_manifest
    from megagpt.model import build

    with torch.device("meta"):
        gpt = build(run.model)
    check_model(read_manifest(newest), {name: tuple(p.shape) for name, p in gpt.named_parameters()})
