# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
"""Cross entropy over a vocabulary that may be cut over ranks: one read of the logits forward, a read and a write back.

    lse  = log sum_v exp(x_v)
    loss = lse - (1 - smoothing) x_target - smoothing / V sum_v x_v + z_loss lse^2      (0 where target < 0)

A rank reduces its own columns to three numbers a row (lse, the target's logit, the sum); one all-gather of those gives
every rank the whole row's loss. The derivative of each number by the logits is known, so everything that follows is
plain autograd on [R].
Legend: R rows, V vocabulary; V_tp the columns of this rank, padding included; W ranks that share the vocabulary.
Numerics: all in fp32. Columns from `vocabulary` on are padding: no probability, no gradient.
Sources: label smoothing, Szegedy et al. 2016, arXiv:1512.00567, section 7; z-loss, Chowdhery et al. 2022,
arXiv:2204.02311, section 5; vocabulary-parallel loss, Shoeybi et al. 2019, arXiv:1909.08053, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from megagpt.kernels.common import accumulator, check_floats, check_shape, on, statistics_dtype
from megagpt.kernels.tuning import tile

LOG2_E = tl.constexpr(1.4426950408889634)


def cross_entropy_reference(
    logits_RV: Tensor, targets_R: Tensor, *, vocabulary: int, smoothing: float = 0.0, z_loss: float = 0.0
) -> Tensor:
    """The definition; half-precision logits are widened to fp32, as the loss of a model always is."""
    x_RV = logits_RV[:, :vocabulary].to(statistics_dtype(logits_RV.dtype))
    lse_R = x_RV.logsumexp(-1)
    target_R = x_RV.gather(1, targets_R[:, None].clamp(min=0))[:, 0]
    loss_R = lse_R - (1 - smoothing) * target_R - smoothing * x_RV.mean(-1) + z_loss * lse_R**2
    return loss_R.masked_fill(targets_R < 0, 0)


@triton.jit(do_not_specialize=["start"])
def _forward(
    logits, targets, lse, target, total, stride, start, COLUMNS, V,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program, one row: a running maximum and sum over blocks of columns."""
    row = tl.program_id(0).to(tl.int64)  # R * V passes 2**31 at real sizes
    x = logits + row * stride
    top = tl.full([], -float("inf"), ACC)
    sum_exp = tl.zeros([BLOCK], ACC)
    sum_all = tl.zeros([BLOCK], ACC)
    for first in tl.range(0, COLUMNS, BLOCK, num_stages=STAGES):
        columns = first + tl.arange(0, BLOCK)
        values = tl.load(x + columns, mask=columns < V, other=0.0).to(ACC)  # V, unlike COLUMNS, keeps loads wide
        values = tl.where(columns < COLUMNS, values, -float("inf"))
        if total is not None:
            sum_all += tl.where(columns < COLUMNS, values, 0.0)
        new_top = tl.maximum(top, tl.max(values, 0))
        safe_top = tl.where(new_top == -float("inf"), 0.0, new_top)
        sum_exp = sum_exp * tl.exp2((top - safe_top) * LOG2_E) + tl.exp2((values - safe_top) * LOG2_E)
        top = new_top
    own = tl.load(targets + row) - start
    is_own = (own >= 0) & (own < COLUMNS)
    tl.store(target + row, tl.load(x + own, mask=is_own, other=0.0).to(ACC))
    row_sum = tl.sum(sum_exp, 0)
    log_sum = tl.log2(tl.where(row_sum == 0, 1.0, row_sum)) / LOG2_E
    tl.store(lse + row, top + log_sum)  # -inf for a rank that holds padding alone
    if total is not None:
        tl.store(total + row, tl.sum(sum_all, 0))


@triton.jit(do_not_specialize=["start"])
def _backward(
    logits, targets, lse, dlse, dtarget, dtotal, dlogits, stride, start, COLUMNS, V,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program, BLOCK columns of one row."""
    blocks = tl.cdiv(V, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(logits + row * stride + columns, mask=columns < V, other=0.0).to(ACC)
    row_lse = tl.load(lse + row)
    probability = tl.exp2((values - tl.where(row_lse == -float("inf"), 0.0, row_lse)) * LOG2_E)
    grad = probability * tl.load(dlse + row)
    grad += tl.where(columns == tl.load(targets + row) - start, tl.load(dtarget + row), 0.0)
    if dtotal is not None:
        grad += tl.load(dtotal + row)
    grad = tl.where(columns < COLUMNS, grad, 0.0)
    tl.store(dlogits + row * V + columns, grad.to(dlogits.dtype.element_ty), mask=columns < V)


@torch.library.custom_op("megagpt::cross_entropy", mutates_args=())
def statistics(
    logits: Tensor, targets: Tensor, start: int, columns: int, with_total: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """lse, the target's logit (0 if it is another rank's) and the sum of the row (empty if not wanted), all [R]."""
    R = logits.shape[0]
    lse = torch.empty(R, dtype=statistics_dtype(logits.dtype), device=logits.device)
    target = torch.empty_like(lse)
    total = torch.empty_like(lse) if with_total else None
    cut = tile("cross_entropy_forward", logits.dtype, 1, logits.device)
    with on(logits):
        _forward[(R,)](
            logits, targets, lse, target, total, logits.stride(0), start, columns, logits.shape[1], BLOCK=cut.columns,
            STAGES=cut.stages, ACC=accumulator(logits.dtype), **cut.options(),
        )  # fmt: skip
    return lse, target, lse.new_empty(0) if total is None else total


@statistics.register_fake
def _(logits, targets, start, columns, with_total):
    lse = logits.new_empty(logits.shape[0], dtype=statistics_dtype(logits.dtype))
    return lse, torch.empty_like(lse), torch.empty_like(lse) if with_total else lse.new_empty(0)


@torch.library.custom_op("megagpt::cross_entropy_backward", mutates_args=())
def logits_gradient(
    dlse: Tensor, dtarget: Tensor, dtotal: Tensor | None, logits: Tensor, targets: Tensor, lse: Tensor, start: int,
    columns: int,
) -> Tensor:  # fmt: skip
    """dlogits_RV, of the three statistics' gradients; padded columns get 0."""
    R, V = logits.shape
    dlogits = torch.empty(R, V, dtype=logits.dtype, device=logits.device)
    dlse, dtarget = dlse.contiguous(), dtarget.contiguous()
    dtotal = None if dtotal is None else dtotal.contiguous()
    cut = tile("cross_entropy_backward", logits.dtype, 1, logits.device)
    with on(logits):
        _backward[(R * triton.cdiv(V, cut.columns),)](
            logits, targets, lse, dlse, dtarget, dtotal, dlogits, logits.stride(0), start, columns, V,
            BLOCK=cut.columns, ACC=accumulator(logits.dtype),
            **cut.options(),
        )  # fmt: skip
    return dlogits


@logits_gradient.register_fake
def _(dlse, dtarget, dtotal, logits, targets, lse, start, columns):
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output) -> None:
    logits, targets, ctx.start, ctx.columns, ctx.with_total = inputs
    ctx.save_for_backward(logits, targets, output[0])


def _differentiate(ctx, dlse, dtarget, dtotal):
    dtotal = dtotal if ctx.with_total else None
    return logits_gradient(dlse, dtarget, dtotal, *ctx.saved_tensors, ctx.start, ctx.columns), None, None, None, None


statistics.register_autograd(_differentiate, setup_context=_save)


class _Gather(torch.autograd.Function):
    """All ranks' statistics, [W, ...]. Every rank goes on to the same loss, so a gradient needs no collective."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank = dist.get_rank(group)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.rank], None


def row_losses(
    parts: tuple[Tensor, Tensor, Tensor], targets_R: Tensor, *, vocabulary: int, group: dist.ProcessGroup | None,
    smoothing: float, z_loss: float,
) -> Tensor:  # fmt: skip
    """The losses of whole rows from the statistics of this rank's columns."""
    lse_R, target_R, total_R = parts
    if group is not None:
        gathered = _Gather.apply(torch.stack([part for part in parts if part.numel()]), group)
        lse_R, target_R = gathered[:, 0].logsumexp(0), gathered[:, 1].sum(0)
        total_R = gathered[:, 2].sum(0) if smoothing > 0 else total_R
    loss_R = lse_R - (1 - smoothing) * target_R
    if smoothing > 0:
        loss_R = loss_R - smoothing / vocabulary * total_R
    if z_loss > 0:
        loss_R = loss_R + z_loss * lse_R**2
    return loss_R.masked_fill(targets_R < 0, 0)


def check_loss(vocabulary: int, start: int, smoothing: float, z_loss: float) -> None:
    """Raises ValueError for a vocabulary, a cut of it, or a weight of the loss that makes no sense."""
    if vocabulary < 1 or start < 0:
        raise ValueError(f"vocabulary is {vocabulary:,} and start {start:,}, but they must be at least 1 and 0.")
    if not 0 <= smoothing < 1 or z_loss < 0:
        raise ValueError(f"smoothing is {smoothing} and z_loss {z_loss}, but they must be in [0, 1) and at least 0.")


def cross_entropy(
    logits_RV: Tensor, targets_R: Tensor, *, vocabulary: int, start: int = 0, group: dist.ProcessGroup | None = None,
    smoothing: float = 0.0, z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """The loss of each row in nats, fp32; 0 where the target is negative.

    `logits_RV` has this rank's columns, which begin at `start` of the whole vocabulary; all ranks of `group` get the
    same losses. Raises ValueError for shapes, dtypes or weights that it lacks.
    """
    check_floats(logits=logits_RV)
    check_loss(vocabulary, start, smoothing, z_loss)
    if logits_RV.dim() != 2:
        raise ValueError(f"logits have shape {tuple(logits_RV.shape)}, but must be [R, V].")
    check_shape("targets", targets_R, logits_RV.shape[:1])
    logits_RV = logits_RV if logits_RV.stride(1) == 1 else logits_RV.contiguous()
    columns = min(max(vocabulary - start, 0), logits_RV.shape[1])
    parts = statistics(logits_RV, targets_R.contiguous(), start, columns, smoothing > 0)
    return row_losses(
        parts, targets_R, vocabulary=vocabulary, group=group, smoothing=smoothing, z_loss=z_loss
    )  # fmt: skip
