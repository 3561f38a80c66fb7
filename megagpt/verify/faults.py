"""Faults that people really make in parallel training, planted on purpose: each must be caught, and named.

A fault is planted in the forked ranks of one layout, by replacing one function of the layout's code. What it breaks
needs a layout with that axis, and sometimes a model with that part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from megagpt.config import Model, Run
from megagpt.errors import UserError, did_you_mean
from megagpt.mesh import Mesh
from megagpt.parallel import cut as cuts
from megagpt.parallel import engine, pipeline, tensor, whole
from megagpt.parallel.cut import Cut, Place
from megagpt.verify.diagnose import Kind


@dataclass(frozen=True)
class Fault:
    """A fault, the layout and the parts of the model that it needs, and what verify must call it."""

    summary: str
    layout: str
    kind: Kind
    plant: Callable[[Mesh], None]
    needs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def model(self, model: Model) -> Model:
        return dataclasses.replace(model, **self.needs)


def named(name: str) -> Fault:
    """The fault of that name. Raises UserError if there is none."""
    if name not in FAULTS:
        raise UserError(f"no fault is called '{name}'.{did_you_mean(name, FAULTS)}", f"Faults: {', '.join(FAULTS)}.")
    return FAULTS[name]


def plant(name: str, mesh: Mesh) -> None:
    """Break this process, for good."""
    named(name).plant(mesh)


def fitting(run: Run, name: str) -> Run:
    """`run` with the parts that the fault needs in its model."""
    return dataclasses.replace(run, model=named(name).model(run.model))


def _missing_all_reduce(_mesh: Mesh) -> None:
    tensor.Tensors.sum_over_ranks = lambda self, x_BTD: x_BTD  # noqa: ARG005


def _tied_twice(_mesh: Mesh) -> None:
    once = pipeline.Pipeline._add_tied_gradients

    def twice(self: pipeline.Pipeline, _engine: Any) -> None:
        once(self, _engine)
        once(self, _engine)

    pipeline.Pipeline._add_tied_gradients = twice


def _loss_divided_twice(_mesh: Mesh) -> None:
    train = whole.Whole.train

    def divided(self: whole.Whole, batches: Any, count: int, *, scale: float, before_step: Any) -> Tensor:
        return train(self, batches, count, scale=scale / count, before_step=before_step)

    whole.Whole.train = divided


def _vocabulary_offset(_mesh: Mesh) -> None:
    make = tensor.VocabularyTable.__init__

    def shifted(self: tensor.VocabularyTable, *arguments: Any) -> None:
        make(self, *arguments)
        self.first += 1 if self.first else 0

    setattr(tensor.VocabularyTable, "__init__", shifted)  # noqa: B010 - another signature


def _swapped_gate_and_up(_mesh: Mesh) -> None:
    right = cuts.CUTS["feed_forward.gate_up"]

    def swapped(model: Model, place: Place) -> Cut:
        gate, up = right(model, place).ranges
        return Cut(0, (up, gate))

    cuts.CUTS["feed_forward.gate_up"] = swapped


def _dropout_by_rank(mesh: Mesh) -> None:
    from megagpt.modules import Dropout

    mask = Dropout.mask

    def by_rank(self: Dropout, samples_B: Tensor) -> Any:
        return mask(self, samples_B + 1000 * mesh.rank)

    Dropout.mask = by_rank


def _bias_on_every_rank(_mesh: Mesh) -> None:
    def forward(self: tensor.RowLinear, x_BTH: Tensor) -> Tensor:
        return self.tensors.sum_over_ranks(F.linear(x_BTH, self.weight, self.bias))

    tensor.RowLinear.forward = forward


def _norm_of_one_rank(_mesh: Mesh) -> None:
    def alone(_self: engine.Engine, gradients: Sequence[Tensor]) -> float:
        return sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5

    setattr(engine.Engine, "global_norm", alone)  # noqa: B010 - another name of self


def _unsummed_norm_gradients(_mesh: Mesh) -> None:
    tensor.summed = lambda x, group: x  # noqa: ARG005


def _stale_copy(mesh: Mesh) -> None:
    train = engine.Engine.train_batch

    def without_update(self: engine.Engine, *arguments: Any, **options: Any) -> engine.Step:
        stale = [part.parameter for part in self.placed if part.name.endswith("norm.weight")]
        before = [parameter.detach().clone() for parameter in stale]
        done = train(self, *arguments, **options)
        if mesh.tensor_rank == mesh.tensor - 1:
            for parameter, value in zip(stale, before, strict=True):
                parameter.data.copy_(value)
        return done

    engine.Engine.train_batch = without_update


FAULTS = {
    "missing-all-reduce": Fault(
        "a row-cut matrix gives each rank's part for the sum", "1x1x2/z1", "missing all-reduce", _missing_all_reduce
    ),
    "tied-gradient-twice": Fault(
        "the tied embedding's gradient is added twice", "1x2x1/z1/a3", "scaled", _tied_twice, {"tied": True}
    ),
    "loss-divided-twice": Fault(
        "the loss is divided by the accumulation twice", "2x1x1/z1/a3", "scaled", _loss_divided_twice
    ),
    "vocabulary-offset": Fault(
        "a rank looks tokens up one row off", "1x1x2/z1", "wrong slice", _vocabulary_offset
    ),
    "swapped-gate-and-up": Fault(
        "the up slice is where the gate slice belongs", "1x1x2/z1", "wrong slice", _swapped_gate_and_up,
        {"feed_forward": "swiglu"},
    ),
    "dropout-by-rank": Fault("masks depend on the rank", "2x1x1/z1", "other dropout mask", _dropout_by_rank),
    "bias-on-every-rank": Fault(
        "the bias of a row-cut matrix is in the sum", "1x1x2/z1", "bias on every rank", _bias_on_every_rank,
        {"biases": "all"},
    ),
    "norm-of-one-rank": Fault(
        "gradients are clipped by one rank's norm", "1x1x2/z1", "norm of one rank", _norm_of_one_rank
    ),
    "unsummed-norm-gradients": Fault(
        "each rank keeps the gradient of its own tokens", "1x1x2/z1/sp", "missing all-reduce", _unsummed_norm_gradients
    ),
    "stale-copy": Fault("a rank does not update its copies", "1x1x2/z0", "stale copy", _stale_copy),
}  # fmt: skip
