"""A run's folder as other jobs see it: the settings, the tokenizer, and the model of its newest checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megagpt import config
from megagpt.checkpoint.folders import checkpoints_of
from megagpt.checkpoint.load import Manifest, check_model, newest_valid, weights
from megagpt.data.corpus import Corpus
from megagpt.data.tokenizer import Tokenizer, load_tokenizer
from megagpt.errors import UserError
from megagpt.model import GPT, build


@dataclass(frozen=True)
class Trained:
    """A run that has a checkpoint."""

    folder: Path
    run: config.Run
    manifest: Manifest

    @property
    def step(self) -> int:
        return int(self.manifest.header["step"])

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder)

    def refuse_other_tokenizer(self, corpus: Corpus) -> None:
        """Raise UserError unless `corpus` was built with the tokenizer that the run was trained with."""
        if corpus.manifest.tokenizer_sha256 != self.tokenizer().sha256():
            raise UserError(
                f"the corpus {corpus.location} was built with another tokenizer than the run {self.folder}.",
                f"Build it again with --tokenizer {self.folder}.",
            )

    def model(self, device: torch.device) -> GPT:
        """The model with the checkpoint's weights, in fp32 on a CPU and in the run's precision on a GPU."""
        from megagpt.parallel.engine import DTYPES

        dtype = torch.float32 if device.type == "cpu" else DTYPES[self.run.train.precision]
        with device:
            gpt = build(self.run.model).to(dtype)
        parameters = dict(gpt.named_parameters())
        check_model(self.manifest, {name: tuple(parameter.shape) for name, parameter in parameters.items()})
        with torch.no_grad():
            for name, value in weights(self.manifest):
                parameters[name].copy_(value)
        return gpt.eval()


def open_trained(folder: Path) -> Trained:
    """The run in `folder`. Raises UserError if it is no run's folder, or has no undamaged checkpoint."""
    run = config.load_run(folder)
    manifest, _ = newest_valid(checkpoints_of(run.checkpoint, folder))
    if manifest is None:
        raise UserError(f"{folder} has no checkpoint yet.", "The first one comes after checkpoint.every steps.")
    return Trained(folder, run, manifest)


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
