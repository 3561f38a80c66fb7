"""`megagpt export` and `megagpt import`: to and from Hugging Face's folders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from megagpt import config
from megagpt.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the newest checkpoint as a folder that transformers loads."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    to: Path
    """Folder to write; it must not exist."""


def run_export(options: Export) -> int:
    """Write the folder, and say how to load it."""
    from megagpt.checkpoint.huggingface import export
    from megagpt.checkpoint.load import weights
    from megagpt.trained import open_trained

    trained = open_trained(options.run)
    export(dict(weights(trained.manifest)), trained.run.model, options.run / "tokenizer.json", options.to)
    print(f"{options.to}: step {trained.step:,} of {options.run}. transformers.AutoModelForCausalLM reads it.")
    return 0


@dataclass(frozen=True, kw_only=True)
class Import:
    """Make a run, at step 0, of a Hugging Face folder: to evaluate, sample, or train further."""

    folder: tyro.conf.Positional[Path]
    """Folder with config.json, safetensors and tokenizer.json."""
    out: Path
    """Folder of the new run; it must not exist."""


def run_import(options: Import) -> int:
    """Write the run's folder with its first checkpoint."""
    from megagpt.checkpoint.huggingface import import_folder
    from megagpt.data.tokenizer import load_tokenizer
    from megagpt.files import write_whole

    if options.out.exists():
        raise UserError(f"{options.out} exists already.", "Choose another --out.")
    model, weights = import_folder(options.folder)
    tokenizer = load_tokenizer(options.folder)
    run = replace(config.Run(), model=model)
    options.out.mkdir(parents=True)
    save_first(run, weights, options.out)
    write_whole(options.out / "tokenizer.json", tokenizer.definition)
    write_whole(options.out / "run.toml", config.to_toml(run))  # last: with it the folder is a run
    print(
        f"{options.out}: {options.folder} at step 0. Train it further with:\n"
        f"  megagpt train {options.out / 'run.toml'} --out {options.out} --data.mixture CORPUS 1"
    )
    return 0


def save_first(run: config.Run, weights: Iterable[tuple[str, Tensor]], out: Path) -> None:
    """Commit the weights, which are read once, as step 0 of a new run, with moments of zero."""
    import torch

    from megagpt.checkpoint import lineage
    from megagpt.checkpoint.boxes import Box
    from megagpt.checkpoint.folders import folder_at
    from megagpt.checkpoint.save import save
    from megagpt.parallel.state import Slice

    def whole(name: str, value: Tensor) -> Slice:
        weight, shape = value.float(), tuple(value.shape)
        box = Box((0,) * value.dim(), shape)
        return Slice(name, shape, box, weight, torch.zeros_like(weight), torch.zeros_like(weight))

    root = folder_at(out / "checkpoints")
    header = {"step": 0, "tokens": 0, "cursor": None, "counters": {"optimizer_steps": 0, "loss_scaler": {}}}
    folder = lineage.commit_folder(root, lineage.begin(root, None), 0)
    parts = [whole(name, value) for name, value in weights]
    save(folder, parts, header={**header, "run": config.to_toml(run)}, rank=0, ranks=1)
