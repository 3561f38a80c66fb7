"""Collectives of the tensor ranks as autograd functions: each has its counterpart as its backward.

    forward                                 backward
    identity                                all-reduce                 `summed`          (g in Shoeybi et al. 2019)
    all-reduce                              identity                   `reduced`         (f)
    reduce-scatter along tokens             all-gather along tokens    `reduced_to_own_tokens`
    all-gather along tokens, times W'       reduce-scatter             `ColumnProduct`

Sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2) splits an all-reduce into its parts,
reduce-scatter and all-gather, so that norms and dropout in between run on a share of the tokens.
Letters: B batch, T tokens, D width, H hidden. `T_tp` is a rank's share of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed them; the old names are deprecated there and the only ones before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_tokens(x_BTD: Tensor, group: Any) -> Tensor:
    """x_B(T_tp)D of every rank, along tokens: x_BTD."""
    return Gathering(x_BTD, group).wait()


def scatter_sum(x_BTD: Tensor, group: Any) -> Tensor:
    """The sum over ranks of x_BTD, of which each rank gets its own tokens: x_B(T_tp)D."""
    return Scattering(x_BTD, group).wait()


class Gathering:
    """An all-gather along tokens under way."""

    def __init__(self, x_BTD: Tensor, group: Any) -> None:
        ranks = dist.get_world_size(group)
        self._parts = x_BTD.new_empty(ranks, *x_BTD.shape)
        self._source = x_BTD.contiguous()
        self._work = _all_gather(self._parts.flatten(0, 1), self._source, group=group, async_op=True)

    def wait(self) -> Tensor:
        assert self._work is not None
        self._work.wait()
        ranks, B, T, D = self._parts.shape
        return self._parts.movedim(0, 1).reshape(B, ranks * T, D)


class Scattering:
    """A reduce-scatter along tokens under way."""

    def __init__(self, x_BTD: Tensor, group: Any) -> None:
        ranks = dist.get_world_size(group)
        B, T, D = x_BTD.shape
        self._parts = x_BTD.view(B, ranks, T // ranks, D).movedim(1, 0).contiguous()
        self._own = x_BTD.new_empty(B, T // ranks, D)
        self._work = _reduce_scatter(self._own, self._parts.flatten(0, 1), group=group, async_op=True)

    def wait(self) -> Tensor:
        assert self._work is not None
        self._work.wait()
        return self._own


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dx = dx.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(dx, group=ctx.group)
        return dx, None


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.mark_dirty(x)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004  # pyright: ignore[reportIncompatibleMethodOverride]
        return dx, None


class _ReducedToOwnTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return scatter_sum(x_BTD, group)

    @staticmethod
    def backward(ctx: Any, dx_BTD: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gather_tokens(dx_BTD, ctx.group), None


class ColumnProduct(torch.autograd.Function):
    """y_BTH = x_BTD W', W cut by rows; its backward sums dx over the ranks while dW is computed.

    With `tokens_cut` x is x_B(T_tp)D: it is gathered for the product and, rather than kept, again in the backward.
    `finish` has the last word on dW. The weight itself is saved, not a view: ZeRO 3 frees and fetches it in between.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BTD: Tensor, weight_HD: Tensor, group: Any, tokens_cut: bool, finish: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(x_BTD, weight_HD)
        ctx.group, ctx.tokens_cut, ctx.finish = group, tokens_cut, finish
        whole_BTD = gather_tokens(x_BTD, group) if tokens_cut else x_BTD
        return whole_BTD @ weight_HD.T

    @staticmethod
    def backward(ctx: Any, dy_BTH: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_BTD, weight_HD = ctx.saved_tensors
        gathering = Gathering(x_BTD, ctx.group) if ctx.tokens_cut else None
        dx_BTD = dy_BTH @ weight_HD
        if gathering is not None:
            x_BTD = gathering.wait()
            summing: Any = Scattering(dx_BTD, ctx.group)
        else:
            dx_BTD = dx_BTD.contiguous()
            summing = dist.all_reduce(dx_BTD, group=ctx.group, async_op=True)
        dweight_HD = dy_BTH.flatten(0, -2).T @ x_BTD.flatten(0, -2)
        own = summing.wait()
        return (own if ctx.tokens_cut else dx_BTD), ctx.finish(dweight_HD), None, None, None


def summed(x: Tensor, group: Any) -> Tensor:
    """`x` itself, whose gradient is the sum of the ranks' gradients: each has computed a part of it."""
    out = _Summed.apply(x, group)
    assert isinstance(out, Tensor)
    return out


def reduced(x: Tensor, group: Any) -> Tensor:
    """The sum over the ranks of `x`, on every rank; `x` is overwritten."""
    out = _Reduced.apply(x, group)
    assert isinstance(out, Tensor)
    return out


def reduced_to_own_tokens(x_BTD: Tensor, group: Any) -> Tensor:
    """The sum over the ranks of x_BTD, of which each rank gets its share of the tokens."""
    out = _ReducedToOwnTokens.apply(x_BTD, group)
    assert isinstance(out, Tensor)
    return out
