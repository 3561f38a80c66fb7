"""Tensor parallelism: the layers of model.py, cut in place over the tensor ranks as `cut.py` says.

    x_BTD -> norm -> [column cut] -> heads or hidden of this rank -> [row cut] -> sum over ranks -> + x_BTD

Matrices become `ColumnLinear`, `RowLinear` and `VocabularyTable`. What else must change changes through the operators
that a module was given (`ops`): the loss over a cut vocabulary, dropout that knows which heads and tokens these are,
and norms whose weights get their gradient from all ranks. With sequence parallelism the residual stream between the
matrices holds the rank's own tokens, x_B(T_tp)D: the sum becomes a reduce-scatter, and the column cut gathers.

Letters: B batch, T tokens, D width, H hidden, N query heads, G key and value heads, K head width, V vocabulary.
Source: Shoeybi et al. 2019, arXiv:1909.08053; Korthikanti et al. 2022, arXiv:2205.05198.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config import Model
from megagpt.model import Attention, Block, Embedding, Head
from megagpt.modules import GeluLinear, Linear, RMSNorm, Table
from megagpt.ops import Mask, Operators
from megagpt.parallel import cut as cuts
from megagpt.parallel.collectives import ColumnProduct, reduced, reduced_to_own_tokens, summed
from megagpt.parallel.cut import Cut, Place
from megagpt.parallel.vocabulary import cross_entropy


@dataclass(frozen=True)
class Tensors:
    """The tensor axis as one rank sees it."""

    place: Place
    group: Any
    sequence_parallel: bool

    def own_tokens(self, tokens: int) -> slice:
        """The rank's share of a sequence."""
        share = tokens // self.place.ranks
        return slice(self.place.rank * share, (self.place.rank + 1) * share)

    def sum_over_ranks(self, x_BTD: Tensor) -> Tensor:
        """Each rank's part of a product, summed: whole, or this rank's tokens of it."""
        return reduced_to_own_tokens(x_BTD, self.group) if self.sequence_parallel else reduced(x_BTD, self.group)


class ColumnLinear(nn.Module):
    """y_BT(H_tp) = x_BTD W' + b, of which this rank has some rows of W and b, and gives those columns of y."""

    def __init__(
        self,
        whole: Linear,
        cut: Cut,
        tensors: Tensors,
        weight: nn.Parameter | None = None,
        shared: _Shared | None = None,
    ) -> None:
        """`weight` is another module's, to be shared; `shared` names rows that other ranks have as well."""
        super().__init__()
        self.weight = _narrowed(whole.weight, cut) if weight is None else weight
        self.bias = None if whole.bias is None else _narrowed(whole.bias, cut)
        self.tensors, self.shared = tensors, shared

    def forward(self, x_BTD: Tensor) -> Tensor:
        y = self.product(x_BTD)
        if self.bias is None:
            return y
        return y + (self.bias if self.shared is None else _SharedGradient.apply(self.bias, self.shared))

    def product(self, x_BTD: Tensor) -> Tensor:
        finish = _unchanged if self.shared is None else self.shared.summed_gradient
        y = ColumnProduct.apply(x_BTD, self.weight, self.tensors.group, self.tensors.sequence_parallel, finish)
        assert isinstance(y, Tensor)
        return y


class ColumnGelu(ColumnLinear):
    """gelu(x_BTD W' + b), of which this rank gives the columns of its rows of W and b."""

    def __init__(self, whole: GeluLinear, cut: Cut, tensors: Tensors) -> None:
        super().__init__(whole, cut, tensors)
        self.ops = whole.ops

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.ops.gelu(self.product(x_BTD), self.bias)


class RowLinear(nn.Module):
    """y_BTD = sum over ranks of x_BT(H_tp) W_tp' + b, of which this rank has some columns of W, and all of b."""

    def __init__(self, whole: Linear, cut: Cut, tensors: Tensors) -> None:
        super().__init__()
        self.weight = _narrowed(whole.weight, cut)
        self.bias = whole.bias
        self.tensors = tensors

    def forward(self, x_BTH: Tensor) -> Tensor:
        y_BTD = self.tensors.sum_over_ranks(F.linear(x_BTH, self.weight))
        if self.bias is None:
            return y_BTD
        return y_BTD + (summed(self.bias, self.tensors.group) if self.tensors.sequence_parallel else self.bias)


class VocabularyTable(nn.Module):
    """One row of features for each token, of which this rank has the rows of its share of the vocabulary."""

    def __init__(self, whole: Table, cut: Cut, tensors: Tensors) -> None:
        super().__init__()
        self.weight = _narrowed(whole.weight, cut)
        self.first = cut.ranges[0].start
        self.tensors = tensors

    def forward(self, tokens_BT: Tensor) -> Tensor:
        own = tokens_BT - self.first
        elsewhere = (own < 0) | (own >= len(self.weight))
        x_BTD = F.embedding(own.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere[..., None], 0)
        return self.tensors.sum_over_ranks(x_BTD)


class OwnTokensTable(nn.Module):
    """One row of features for each index, looked up for this rank's tokens alone."""

    def __init__(self, whole: Table, tensors: Tensors) -> None:
        super().__init__()
        self.weight = whole.weight
        self.tensors = tensors

    def forward(self, index: Tensor) -> Tensor:
        own = index[..., self.tensors.own_tokens(index.shape[-1])]
        return F.embedding(own, summed(self.weight, self.tensors.group))


class _Shared:
    """Rows that several ranks hold: their gradient is the sum of what those ranks computed."""

    def __init__(self, cut: Cut, first: int, rows: int, group: Any) -> None:
        """Rows of the whole from `first` on, `rows` of them, may be shared."""
        self._first, self._rows, self._group = first, rows, group
        self._ranges = [part for part in cut.ranges if part.start >= first]
        self._kept = sum(len(part) for part in self._ranges)

    def summed_gradient(self, gradient: Tensor) -> Tensor:
        whole = gradient.new_zeros(self._rows, *gradient.shape[1:])
        own = gradient[len(gradient) - self._kept :]
        places = [slice(part.start - self._first, part.stop - self._first) for part in self._ranges]
        for place, part in zip(places, own.split([len(part) for part in self._ranges]), strict=True):
            whole[place] = part
        dist.all_reduce(whole, group=self._group)
        return torch.cat([gradient[: len(gradient) - self._kept], *(whole[place] for place in places)])


class _SharedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shared: _Shared) -> Tensor:
        ctx.shared = shared
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.shared.summed_gradient(dx), None


def _unchanged(gradient: Tensor) -> Tensor:
    return gradient


def _narrowed(whole: nn.Parameter, cut: Cut) -> nn.Parameter:
    """A parameter without values, with this rank's part of the shape of `whole`."""
    shape = list(whole.shape)
    shape[cut.dim] = cut.size()
    return nn.Parameter(torch.empty(shape, dtype=whole.dtype, device=whole.device))


def cut_layers(layers: Sequence[nn.Module], model: Model, tensors: Tensors) -> None:
    """Cut the layers of model.layers() in place; their parameters must not have values yet."""
    embedding, *blocks, head = layers
    _cut_embedding(cast(Embedding, embedding), model, tensors)
    for block in blocks:
        _cut_block(cast(Block, block), model, tensors)
    _cut_head(cast(Head, head), cast(Embedding, embedding), model, tensors)


def _cut_embedding(embedding: Embedding, model: Model, tensors: Tensors) -> None:
    token: Any = VocabularyTable(embedding.token, cuts.CUTS["embedding.token"](model, tensors.place), tensors)
    embedding.token = token
    if tensors.sequence_parallel:
        if embedding.position is not None:
            position: Any = OwnTokensTable(embedding.position, tensors)
            embedding.position = position
        embedding.dropout.ops = _on_own_tokens(embedding.dropout.ops, tensors)


def _cut_block(block: Block, model: Model, tensors: Tensors) -> None:
    _cut_attention(block.attention, model, tensors)
    feed_forward: Any = block.feed_forward
    for name, kind in (("up", ColumnGelu), ("gate_up", ColumnLinear)):
        if hasattr(feed_forward, name):
            cut = cuts.CUTS[f"feed_forward.{name}"](model, tensors.place)
            setattr(feed_forward, name, kind(getattr(feed_forward, name), cut, tensors))
    down = cuts.CUTS["feed_forward.down"](model, tensors.place)
    feed_forward.down = RowLinear(feed_forward.down, down, tensors)
    if tensors.sequence_parallel:
        own: tuple[Any, ...] = (block.attention_norm, block.feed_forward_norm, block.feed_forward_dropout)
        for module in own:
            module.ops = _on_own_tokens(module.ops, tensors)


def _cut_attention(attention: Attention, model: Model, tensors: Tensors) -> None:
    place = tensors.place
    cut = cuts.CUTS["attention.query_key_value"](model, place)
    N, G, K = model.heads, model.key_value_heads(), attention.head_width
    replicated = G % place.ranks != 0
    shared = _Shared(cut, N * K, 2 * G * K, tensors.group) if replicated else None
    qkv: Any = ColumnLinear(attention.query_key_value, cut, tensors, shared=shared)
    attention.query_key_value = qkv
    output: Any = RowLinear(attention.output, cuts.CUTS["attention.output"](model, place), tensors)
    attention.output = output
    attention.heads, attention.kv_heads = N // place.ranks, len(cuts.kv_heads_of(model, place))
    attention.ops = _on_own_heads(attention.ops, model, place)
    for norm in (attention.query_norm, attention.key_norm):
        if norm is not None:
            cast(RMSNorm, norm).ops = _with_summed_norms(cast(RMSNorm, norm).ops, tensors.group)


def _cut_head(head: Head, embedding: Embedding, model: Model, tensors: Tensors) -> None:
    cut = cuts.CUTS["head.output"](model, tensors.place)
    output: Any = ColumnLinear(head.output, cut, tensors, weight=embedding.token.weight if model.tied else None)
    head.output = output
    if tensors.sequence_parallel:
        norm: Any = head.norm
        norm.ops = _with_summed_norms(norm.ops, tensors.group)
    first, group = cut.ranges[0].start, tensors.group
    head.ops = replace(
        head.ops,
        cross_entropy=lambda logits_RV, targets_R, *, vocabulary: cross_entropy(
            logits_RV, targets_R, vocabulary=vocabulary, first=first, group=group
        ),
    )


def _with_summed_norms(ops: Operators, group: Any) -> Operators:
    """Norms that see a part of the tokens or heads: the gradient of their weights is the sum over the ranks."""
    return replace(
        ops,
        layernorm=lambda x, w, b, eps: ops.layernorm(x, summed(w, group), summed(b, group), eps),
        rmsnorm=lambda x, w, eps: ops.rmsnorm(x, summed(w, group), eps),
        add_layernorm=lambda x, h, w, b, **rest: ops.add_layernorm(x, h, summed(w, group), summed(b, group), **rest),
        add_rmsnorm=lambda x, h, w, **rest: ops.add_rmsnorm(x, h, summed(w, group), **rest),
    )


def _on_own_tokens(ops: Operators, tensors: Tensors) -> Operators:
    """Norms and dropout where a rank has its own tokens of each sequence."""
    norms = _with_summed_norms(ops, tensors.group)

    def own(operator: Callable[..., Any]) -> Callable[..., Any]:
        def of_own_tokens(x_BTD: Tensor, *rest: Any, mask: Mask | None, **options: Any) -> Any:
            placed = None if mask is None else replace(mask, first_token=tensors.place.rank * x_BTD.shape[1])
            return operator(x_BTD, *rest, mask=placed, **options)

        return of_own_tokens

    return replace(
        norms,
        dropout=own(ops.dropout),
        add_residual=own(ops.add_residual),
        add_layernorm=own(norms.add_layernorm),
        add_rmsnorm=own(norms.add_rmsnorm),
    )


def _on_own_heads(ops: Operators, model: Model, place: Place) -> Operators:
    """Attention of this rank's query heads: dropout goes by their numbers in the whole model, and each finds its key
    and value head also where those do not divide evenly among the ranks.
    """
    first_head = place.rank * (model.heads // place.ranks)
    found = cuts.kv_head_of_each_query(model, place)

    def attention(q: Tensor, k: Tensor, v: Tensor, *, dropout: Any, **options: Any) -> Tensor:
        if found is not None:
            index = torch.tensor(found, device=k.device)
            k, v = k.index_select(2, index), v.index_select(2, index)
        mask = None if dropout is None else replace(dropout, first_head=first_head)
        return ops.attention(q, k, v, dropout=mask, **options)

    return replace(ops, attention=attention)
