"""Cross entropy over a vocabulary that is cut over the tensor ranks: no rank ever holds all logits.

    loss = log(sum over ranks of sum exp(logits - m)) + m - logits[target],     m the largest logit of all ranks

Two all-reduces of R and 2 R numbers forward, none backward  (Shoeybi et al. 2019, arXiv:1909.08053, section 3).
Letters: R rows, V_tp this rank's share of the vocabulary with its padding.
Numerics: statistics in fp32, or fp64 for fp64 logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def cross_entropy(logits_RV: Tensor, targets_R: Tensor, *, vocabulary: int, first: int, group: Any) -> Tensor:
    """As `ops.cross_entropy`, of this rank's columns, which are the tokens from `first` on."""
    loss_R = _CrossEntropy.apply(logits_RV, targets_R, vocabulary, first, group)
    assert isinstance(loss_R, Tensor)
    return loss_R


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_RV: Tensor, targets_R: Tensor, vocabulary: int, first: int, group: Any) -> Tensor:
        dtype = torch.promote_types(logits_RV.dtype, torch.float32)
        real = max(0, min(logits_RV.shape[1], vocabulary - first))
        wide_RV = logits_RV[:, :real].to(dtype)
        padding_only = wide_RV.new_full(targets_R.shape, -torch.inf)
        largest_R = wide_RV.amax(1) if real else padding_only
        dist.all_reduce(largest_R, op=dist.ReduceOp.MAX, group=group)
        own_R = targets_R - first
        here_R = (own_R >= 0) & (own_R < real)
        sums_2R = wide_RV.new_zeros(2, len(targets_R))
        sums_2R[0] = (wide_RV - largest_R[:, None]).exp().sum(1)
        if real:
            found_R = wide_RV.gather(1, own_R.clamp(0, real - 1)[:, None])[:, 0]
            sums_2R[1] = found_R.masked_fill(~here_R, 0)
        dist.all_reduce(sums_2R, group=group)
        log_total_R = sums_2R[0].log() + largest_R
        ctx.save_for_backward(logits_RV, targets_R, log_total_R)
        ctx.real, ctx.first = real, first
        return (log_total_R - sums_2R[1]).masked_fill(targets_R < 0, 0)

    @staticmethod
    def backward(ctx: Any, dloss_R: Tensor) -> tuple[Tensor, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits_RV, targets_R, log_total_R = ctx.saved_tensors
        real = ctx.real
        dlogits_RV = torch.zeros_like(logits_RV)
        if real:
            dloss_R1 = dloss_R.masked_fill(targets_R < 0, 0)[:, None]
            d = (logits_RV[:, :real].to(dloss_R.dtype) - log_total_R[:, None]).exp_().mul_(dloss_R1)
            own_R = targets_R - ctx.first
            here_R = (own_R >= 0) & (own_R < real)
            d.scatter_add_(1, own_R.clamp(0, real - 1)[:, None], -dloss_R1.masked_fill(~here_R[:, None], 0))
            dlogits_RV[:, :real] = d
        return dlogits_RV, None, None, None, None
