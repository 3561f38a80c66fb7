"""What the commands on runs do: options as dataclasses (their docstrings are the help), and one function each.

Nothing heavy is imported before it is needed, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

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
    name = path.parent.name if path.name == "run.toml" else path.stem
    return Train(**_fields(run), out=Path("runs") / (name or "run"))


def run_train(options: Train, *, preset: str = "") -> int:
    """Check the run, prepare its folder and train: on the ranks of a launcher, or on local ones started here."""
    from megagpt.parallel import ranks

    run = checked(config.Run(**_fields(options)))
    if ranks.launched():
        check_world(run, ranks.world_size())
    if ranks.rank() == 0:
        for cost in costs_of(run):
            print(f"megagpt: warning: {cost}", file=sys.stderr)
    if preset == "quickstart":
        _quickstart_corpora(run)
    prepare(run, options.out, write=not options.dry_run and ranks.rank() == 0)
    if options.dry_run:
        return 0
    if ranks.launched():
        _fit(run, options.out)
        return 0
    status = ranks.run_local(lambda: _fit(run, options.out), run.parallel.world_size())
    return status


def _fields(tree: config.Run) -> dict[str, Any]:
    """The sections of a run, by name."""
    return {spec.name: getattr(tree, spec.name) for spec in dataclasses.fields(config.Run)}


def _fit(run: config.Run, out: Path) -> None:
    from megagpt.train import fit

    fit(run, out)


def _quickstart_corpora(run: config.Run) -> None:
    """The quickstart reads the demo's corpora; whoever has not run the demo gets them now."""
    from megagpt.demo import build_corpora

    missing = [folder for folder in run.data.mixture if not Path(folder).exists()]
    if missing:
        build_corpora(Path(missing[0]).parent, vocabulary=run.model.vocabulary)


def prepare(run: config.Run, out: Path, *, write: bool) -> None:
    """Everything that can be refused before a rank starts; then, with `write`, the run's folder with run.toml in it.

    Raises UserError for a corpus that is missing, damaged, of another tokenizer or too large a vocabulary, and for a
    folder whose checkpoint is of another model.
    """
    from megagpt.data.corpus import open_mixture

    first = open_mixture(run.data.mixture)[0]
    if first.manifest.vocabulary > run.model.vocabulary:
        raise UserError(
            f"model.vocabulary = {run.model.vocabulary:,} is less than the {first.manifest.vocabulary:,} tokens of the "
            f"tokenizer of {first.folder}.",
            f"Use --model.vocabulary {-(-first.manifest.vocabulary // 64) * 64}.",
        )
    _refuse_other_model(run, out)
    if write:
        out.mkdir(parents=True, exist_ok=True)
        with whole(out / "tokenizer.json") as temporary:
            shutil.copyfile(first.folder / "tokenizer.json", temporary)


def _refuse_other_model(run: config.Run, out: Path) -> None:
    """Compare shapes with the folder's newest checkpoint, on torch's meta device."""
    from megagpt.checkpoint.lineage import commits

    newest = next(commits(out / "checkpoints"), None)
    if newest is None:
        return
    import torch

    from megagpt.checkpoint.load import check_model, read_manifest
    from megagpt.model import build

    with torch.device("meta"):
        gpt = build(run.model)
    check_model(read_manifest(newest), {name: tuple(p.shape) for name, p in gpt.named_parameters()})


@dataclass(frozen=True, kw_only=True)
class Eval:
    """The loss of a run's newest checkpoint on held-out documents."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    corpus: tuple[Path, ...] = ()
    """Corpora to evaluate on; none given: those of the run's mixture."""
    sequences: int = 256
    """Held-out sequences of each corpus."""
    json: bool = False
    """Print one JSON object instead of a table."""


def run_eval(options: Eval) -> int:
    """Print loss, perplexity and bits per byte on each corpus."""
    from megagpt.data.corpus import open_corpus
    from megagpt.evaluate import evaluate_corpus
    from megagpt.trained import default_device, open_trained

    trained = open_trained(options.run)
    corpora = [open_corpus(folder) for folder in options.corpus or map(Path, trained.run.data.mixture)]
    for corpus in corpora:
        trained.refuse_other_tokenizer(corpus)
    device = default_device()
    gpt = trained.model(device)
    results = [
        evaluate_corpus(
            lambda batch: gpt(batch.to(device)),
            corpus,
            sequences=options.sequences,
            context=trained.run.model.context,
            micro_batch=trained.run.train.micro_batch,
            data=trained.run.data,
        )
        for corpus in corpora
    ]
    if options.json:
        print(json.dumps({"step": trained.step, "evaluations": [dataclasses.asdict(item) for item in results]}))
        return 0
    print(f"{options.run}, step {trained.step:,}")
    for item in results:
        print(
            f"  {item.corpus:<16} loss {item.loss:.4f}  perplexity {item.perplexity:,.2f}  "
            f"{item.bits_per_byte:.4f} bits per byte  ({item.sequences:,} sequences, {item.tokens:,} tokens)"
        )
    return 0
