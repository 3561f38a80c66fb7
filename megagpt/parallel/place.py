"""The rank's part of the model: its layers, cut and with their initial values, and where each parameter belongs.

The whole model is built without memory (on torch's meta device), cut over the tensor ranks, and of its list of layers
a stage keeps a run. Only then do parameters get memory: one after another, each drawn by its global name and narrowed,
so that every layout starts from the same numbers and no rank ever holds more than one whole parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megagpt import config
from megagpt.checkpoint import boxes
from megagpt.checkpoint.boxes import Box
from megagpt.config import Run
from megagpt.mesh import Groups, Mesh
from megagpt.model import GPT, build, initial_value, layers
from megagpt.parallel.cut import Cut, Place, cut_of, vocabulary_rows
from megagpt.parallel.tensor import Tensors, cut_layers


@dataclass(frozen=True)
class Piece:
    """A box of a whole parameter, and where its elements lie in a flat range of the local one."""

    whole: Box
    owned: bool
    """Whether this rank answers for it among the ranks of its replica that have it as well."""
    offset: int
    enclosing: Box
    """The part of the range, from `offset` on, that is a box of the local parameter."""
    inside: Box
    """The piece within it."""

    def view(self, flat: Tensor) -> Tensor:
        """The piece of a tensor that holds the range."""
        part = flat[self.offset : self.offset + self.enclosing.elements()]
        return part.view(self.enclosing.size)[self.inside.slices()]


@dataclass(frozen=True)
class Placed:
    """A parameter on this rank, and which part of the whole model's parameter it is."""

    name: str
    """Global name."""
    shape: tuple[int, ...]
    """Of the whole parameter, without padding."""
    local_shape: tuple[int, ...]
    cut: Cut | None
    parameter: nn.Parameter
    owned: bool
    """Whether this rank answers for what it has of it among the ranks of its replica."""

    def pieces_of(self, start: int, count: int) -> Iterator[Piece]:
        """The boxes of the whole parameter that its local elements [start, start + count), in row-major order, are."""
        offset = 0
        for local in boxes.of_range(self.local_shape, start, count):
            for inside, whole, owned in self._pieces():
                common = boxes.overlap(local, inside)
                if common is None:
                    continue
                corner = tuple(c - i + w for c, i, w in zip(common.start, inside.start, whole.start, strict=True))
                yield Piece(Box(corner, common.size), owned, offset, local, common.inside(local))
            offset += local.elements()

    def _pieces(self) -> Iterator[tuple[Box, Box, bool]]:
        """Boxes of the local parameter, what they are in the whole, and whether owned. Padding is in none of them."""
        if self.cut is None:
            everything = Box((0,) * len(self.shape), self.shape)
            yield everything, everything, self.owned
            return
        dim, at = self.cut.dim, 0
        for part in self.cut.ranges:
            length = min(part.stop, self.shape[dim]) - part.start
            if length > 0:
                size = (*self.shape[:dim], length, *self.shape[dim + 1 :])
                yield _box(dim, at, size), _box(dim, part.start, size), self.owned and part.owned
            at += len(part)


def _box(dim: int, start: int, size: tuple[int, ...]) -> Box:
    return Box(tuple(start if axis == dim else 0 for axis in range(len(size))), size)


@dataclass(frozen=True)
class Part:
    """What one rank has of the model."""

    layers: list[nn.Module]
    """All of the model's layers; only those of this rank's stage have parameters with values."""
    first: int
    """Of this stage's layers."""
    stop: int
    placed: list[Placed]
    """This stage's parameters, in forward order."""

    def gpt(self) -> GPT:
        """The whole model, where it has one stage."""
        return GPT(self.layers)


def part_of(
    run: Run,
    mesh: Mesh,
    groups: Groups,
    *,
    bounds: list[int],
    make: Callable[[Tensor], nn.Parameter],
    finish: Callable[[nn.Module], None],
) -> Part:
    """Build this rank's part of the model. Stage s has the layers [bounds[s], bounds[s + 1]).

    `make` turns an initial value (fp32, on the CPU) into a parameter; `finish` gets each layer that is complete.
    """
    model, place = run.model, Place(mesh.tensor_rank, mesh.tensor)
    with torch.device("meta"):
        rows = vocabulary_rows(model, mesh.tensor)
        found = layers(model, seed=run.seed, recompute=run.train.recompute, vocabulary_rows=rows)
        if mesh.tensor > 1:
            cut_layers(found, model, Tensors(place, groups.tensor, run.parallel.sequence_parallel))
    names = {id(parameter): name for name, parameter in GPT(found).named_parameters()}
    shapes = whole_shapes(model)
    first, stop = bounds[mesh.pipeline_rank], bounds[mesh.pipeline_rank + 1]
    placed: dict[int, Placed] = {}
    for layer in found[first:stop]:
        for module, key, meta in _without_values(layer):
            if id(meta) not in placed:
                name = names[id(meta)]
                cut = cut_of(name, model, place)
                value = initial_part(name, shapes[name], tuple(meta.shape), cut, model, seed=run.seed)
                tied_copy = name == "embedding.token.weight" and first > 0
                owned = not tied_copy and (cut is not None or mesh.tensor_rank == 0)
                placed[id(meta)] = Placed(name, shapes[name], tuple(meta.shape), cut, make(value), owned)
            setattr(module, key, placed[id(meta)].parameter)
        finish(layer)
    return Part(found, first, stop, list(placed.values()))


def _without_values(layer: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """The parameters of a layer, and where they are kept."""
    return [
        (module, key, parameter)
        for module in layer.modules()
        for key, parameter in module.named_parameters(recurse=False)
    ]


def whole_shapes(model: config.Model) -> dict[str, tuple[int, ...]]:
    """Of the whole model's parameters without padding, by global name, in forward order."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in build(model).named_parameters()}


def initial_part(
    name: str, shape: tuple[int, ...], local_shape: tuple[int, ...], cut: Cut | None, model: config.Model, *, seed: int
) -> Tensor:
    """fp32: the initial value of this rank's part of the parameter; padding is 0."""
    whole = initial_value(name, shape, model, seed=seed)
    if cut is None:
        parts = [whole]
    else:
        size = shape[cut.dim]
        parts = [
            whole.narrow(cut.dim, min(part.start, size), max(0, min(part.stop, size) - part.start))
            for part in cut.ranges
        ]
    value = torch.zeros(local_shape)
    at, dim = 0, 0 if cut is None else cut.dim
    for part in parts:
        value.narrow(dim, at, part.shape[dim]).copy_(part)
        at += part.shape[dim]
    return value
