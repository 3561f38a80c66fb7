# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
"""LayerNorm and RMSNorm, with the residual stream's addition and dropout in the same pass.

    h = residual + dropout(x)                       (h = x where there is neither)
    layernorm: y = (h - mean) * rstd * w + b        (Ba et al. 2016, arXiv:1607.06450)
    rmsnorm:   y = h * rstd * w                     (Zhang and Sennrich 2019, arXiv:1910.07467)

Legend: B batch, T tokens, D features, R rows (all dims of x but the last), P partial sums of dw and db.
Numerics: dropout and addition in fp32, then h is rounded once; statistics of the rounded h in fp32, saved in fp32; dw
and db summed in fp32, in a fixed order.
Cost: bandwidth. Forward reads x and residual and writes h and y; backward reads dy, h and dh and writes dx.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from megagpt.kernels.common import (
    Mask,
    accumulator,
    check_floats,
    check_shape,
    on,
    signed,
    statistics_dtype,
    sum_partials,
)
from megagpt.kernels.philox import kept, threshold
from megagpt.kernels.tuning import tile

WIDEST = 16_384


def layernorm_reference(h_RD: Tensor, w_D: Tensor, b_D: Tensor | None, eps: float = 1e-5) -> Tensor:
    """The definition, in the dtype it is given: fp64 is the truth, bf16 the yardstick."""
    return F.layer_norm(h_RD, w_D.shape, w_D, b_D, eps)


def rmsnorm_reference(h_RD: Tensor, w_D: Tensor, eps: float = 1e-5) -> Tensor:
    """The definition, in the dtype it is given."""
    return F.rms_norm(h_RD, w_D.shape, w_D, eps)


@triton.jit(do_not_specialize=["key", "first_token"])
def _forward(
    x, residual, w, b, y, h, mean, rstd, samples, key, first_token, R, T, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, CENTRED: tl.constexpr, RATE: tl.constexpr,
    THRESHOLD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program, ROWS rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # R * D passes 2**31 at real sizes
    columns = tl.arange(0, BLOCK_D)
    valid = (rows[:, None] < R) & (columns[None, :] < D)
    at = rows[:, None] * D + columns[None, :]
    hidden = tl.load(x + at, mask=valid, other=0.0).to(ACC)
    if RATE > 0:
        sample = tl.load(samples + rows // T, mask=rows < R, other=0)
        at_C4, token = tl.arange(0, BLOCK_D // 4), first_token + rows % T
        keep = kept(key, at_C4, token, sample, tl.zeros([], tl.int32), THRESHOLD)
        hidden = tl.where(keep, hidden * (1 / (1 - RATE)), 0.0)
    if residual is not None:
        hidden += tl.load(residual + at, mask=valid, other=0.0).to(ACC)
    if h is not None:
        rounded = hidden.to(h.dtype.element_ty)
        tl.store(h + at, rounded, mask=valid)
        hidden = rounded.to(ACC)  # the backward sees the rounded h, so its statistics must be of that one
    if CENTRED:
        mu = tl.sum(hidden, 1) / D
        tl.store(mean + rows, mu, mask=rows < R)
        hidden = tl.where(valid, hidden - mu[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(hidden * hidden, 1) / D + eps)
    tl.store(rstd + rows, scale, mask=rows < R)
    out = hidden * scale[:, None] * tl.load(w + columns, mask=columns < D, other=0.0).to(ACC)[None, :]
    if b is not None:
        out += tl.load(b + columns, mask=columns < D, other=0.0).to(ACC)[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["key", "first_token"])
def _backward(
    dy, dh, h, w, mean, rstd, dresidual, dx, dw, db, samples, key, first_token, R, T,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, CENTRED: tl.constexpr, RATE: tl.constexpr,
    THRESHOLD: tl.constexpr, ACC: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program, every P-th group of ROWS rows; it sums its part of dw and db in registers."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_D)
    dw_sum = tl.zeros([ROWS, BLOCK_D], ACC)
    db_sum = tl.zeros([ROWS, BLOCK_D], ACC)
    for group in tl.range(program, tl.cdiv(R, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = (group * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        valid = (rows[:, None] < R) & (columns[None, :] < D)
        at = rows[:, None] * D + columns[None, :]
        scale = tl.load(rstd + rows, mask=rows < R, other=0.0)[:, None]
        centre = tl.load(mean + rows, mask=rows < R, other=0.0)[:, None] if CENTRED else 0.0
        weight = tl.load(w + columns, mask=columns < D, other=0.0).to(ACC)[None, :]
        grad = tl.load(dy + at, mask=valid, other=0.0, eviction_policy="evict_last").to(ACC)
        normal = tl.load(h + at, mask=valid, other=0.0, eviction_policy="evict_last").to(ACC)
        normal = (normal - centre) * scale
        along = (tl.sum(grad * weight * normal, 1) / D)[:, None]
        level = (tl.sum(grad * weight, 1) / D)[:, None] if CENTRED else 0.0
        if WIDE:  # what a row needs twice does not fit in registers beside the sums: read it again, from the cache
            weight = tl.load(w + columns, mask=columns < D, other=0.0, eviction_policy="evict_first").to(ACC)[None, :]
            grad = tl.load(dy + at, mask=valid, other=0.0, eviction_policy="evict_first").to(ACC)
            normal = tl.load(h + at, mask=valid, other=0.0, eviction_policy="evict_first").to(ACC)
            normal = (normal - centre) * scale
        dw_sum += grad * normal
        if db is not None:
            db_sum += grad
        dhidden = (grad * weight - normal * along - level) * scale
        if dh is not None:
            dhidden += tl.load(dh + at, mask=valid, other=0.0).to(ACC)
        if dresidual is not None:
            tl.store(dresidual + at, dhidden.to(dresidual.dtype.element_ty), mask=valid)
        if RATE > 0:
            sample = tl.load(samples + rows // T, mask=rows < R, other=0)
            at_C4, token = tl.arange(0, BLOCK_D // 4), first_token + rows % T
            keep = kept(key, at_C4, token, sample, tl.zeros([], tl.int32), THRESHOLD)
            dhidden = tl.where(keep, dhidden * (1 / (1 - RATE)), 0.0)
        tl.store(dx + at, dhidden.to(dx.dtype.element_ty), mask=valid)
    to = program.to(tl.int64) * D + columns
    tl.store(dw + to, tl.sum(dw_sum, 0), mask=columns < D)
    if db is not None:
        tl.store(db + to, tl.sum(db_sum, 0), mask=columns < D)


@torch.library.custom_op("megagpt::norm", mutates_args=())
def _norm(
    x: Tensor, residual: Tensor | None, w: Tensor, b: Tensor | None, samples: Tensor | None,
    rate: float, key: int, first_token: int, eps: float, centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, h, mean and rstd; h is empty where it is x itself, and mean where nothing is centred."""
    D = x.shape[-1]
    R = x.numel() // D
    y = torch.empty_like(x)
    h = torch.empty_like(x) if residual is not None or rate > 0 else None
    rstd_R = torch.empty(R, dtype=statistics_dtype(x.dtype), device=x.device)
    mean_R = torch.empty_like(rstd_R) if centred else None
    cut = tile("norm_forward", x.dtype, D, x.device)
    with on(x):
        _forward[(triton.cdiv(R, cut.rows),)](
            x, residual, w, b, y, h, mean_R, rstd_R, samples, key, first_token, R, x.shape[-2], eps,
            D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), ROWS=cut.rows, CENTRED=centred, RATE=rate,
            THRESHOLD=threshold(rate), ACC=accumulator(x.dtype), **cut.options(),
        )  # fmt: skip
    return y, x.new_empty(0) if h is None else h, rstd_R.new_empty(0) if mean_R is None else mean_R, rstd_R


@_norm.register_fake
def _(x, residual, w, b, samples, rate, key, first_token, eps, centred):
    R = x.numel() // x.shape[-1]
    rstd_R = x.new_empty(R, dtype=statistics_dtype(x.dtype))
    h = x.new_empty(0) if residual is None and rate == 0 else torch.empty_like(x)
    return torch.empty_like(x), h, torch.empty_like(rstd_R) if centred else rstd_R.new_empty(0), rstd_R


@torch.library.custom_op("megagpt::norm_backward", mutates_args=())
def _norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, w: Tensor, mean: Tensor, rstd: Tensor, samples: Tensor | None,
    rate: float, key: int, first_token: int, has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dresidual (empty where it equals dx), dw and db (empty without a bias)."""
    D = h.shape[-1]
    R = h.numel() // D
    dy = dy.contiguous()
    cut = tile("norm_backward", h.dtype, D, h.device)
    P = max(1, min(cut.programs, triton.cdiv(R, cut.rows)))
    dx = torch.empty_like(h)
    dresidual = torch.empty_like(h) if rate > 0 else None
    dw_PD = rstd.new_empty(P, D)
    db_PD = rstd.new_empty(P, D) if has_bias else None
    with on(h):
        _backward[(P,)](
            dy, dh if dh is None else dh.contiguous(), h, w, mean, rstd, dresidual, dx, dw_PD, db_PD, samples, key,
            first_token, R, h.shape[-2], D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), ROWS=cut.rows,
            CENTRED=mean.numel() > 0, RATE=rate, THRESHOLD=threshold(rate), ACC=accumulator(h.dtype),
            STAGES=cut.stages, WIDE=D > 8192, **cut.options(),
        )  # fmt: skip
    db = h.new_empty(0) if db_PD is None else sum_partials(db_PD, h.dtype)
    return dx, h.new_empty(0) if dresidual is None else dresidual, sum_partials(dw_PD, h.dtype), db


@_norm_backward.register_fake
def _(dy, dh, h, w, mean, rstd, samples, rate, key, first_token, has_bias):
    dresidual = torch.empty_like(h) if rate > 0 else h.new_empty(0)
    return torch.empty_like(h), dresidual, torch.empty_like(w), torch.empty_like(w) if has_bias else h.new_empty(0)


def _save(ctx, inputs, output) -> None:
    x, residual, w, b, samples, rate, key, first_token, _, _ = inputs
    _, h, mean, rstd = output
    ctx.save_for_backward(x if residual is None and rate == 0 else h, w, mean, rstd, samples)
    ctx.dropout, ctx.has_residual, ctx.has_bias = (rate, key, first_token), residual is not None, b is not None
    ctx.has_own_h = residual is not None or rate > 0
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, dh, dmean, drstd):
    h, w, mean, rstd, samples = ctx.saved_tensors
    dy = torch.zeros_like(h) if dy is None else dy
    dh = dh if ctx.has_own_h else None
    dx, dresidual, dw, db = _norm_backward(dy, dh, h, w, mean, rstd, samples, *ctx.dropout, ctx.has_bias)
    if ctx.has_residual and ctx.dropout[0] == 0:
        dresidual = dx
    return dx, dresidual if ctx.has_residual else None, dw, db if ctx.has_bias else None, *[None] * 6


_norm.register_autograd(_differentiate, setup_context=_save)


def _checked(x: Tensor, w_D: Tensor, b_D: Tensor | None, residual: Tensor | None, mask: Mask | None) -> None:
    check_floats(x=x, w=w_D, b=b_D, residual=residual)
    D = x.shape[-1]
    if not 1 <= D <= WIDEST:
        raise ValueError(f"x has {D:,} features, but must have from 1 to {WIDEST:,}.")
    check_shape("w", w_D, (D,))
    if b_D is not None:
        check_shape("b", b_D, (D,))
    if residual is not None:
        check_shape("residual", residual, x.shape)
    if mask is not None:
        if x.dim() != 3:
            raise ValueError(f"x has shape {tuple(x.shape)}, but with dropout it must be [B, T, D].")
        check_shape("mask.samples_B", mask.samples_B, (x.shape[0],))


def _run(x, w_D, b_D, residual, mask, eps, *, centred: bool) -> tuple[Tensor, Tensor]:
    _checked(x, w_D, b_D, residual, mask)
    rows = x.contiguous() if x.dim() > 1 else x.reshape(1, -1)
    residual = residual if residual is None else residual.contiguous().view(rows.shape)
    samples, rate, key, first_token = None, 0.0, 0, 0
    if mask is not None and mask.rate > 0:
        samples, rate, key, first_token = mask.samples_B, mask.rate, signed(mask.key), mask.first_token
    y, h, _, _ = _norm(rows, residual, w_D, b_D, samples, rate, key, first_token, eps, centred)
    return y.view(x.shape), x if residual is None and rate == 0 else h.view(x.shape)


def layernorm(x: Tensor, w_D: Tensor, b_D: Tensor | None, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dim of `x` (any leading shape). Raises ValueError for shapes or dtypes it lacks."""
    return _run(x, w_D, b_D, None, None, eps, centred=True)[0]


def rmsnorm(x: Tensor, w_D: Tensor, eps: float = 1e-5) -> Tensor:
    """RMSNorm over the last dim of `x` (any leading shape). Raises ValueError on shapes, dtypes or widths it lacks."""
    return _run(x, w_D, None, None, None, eps, centred=False)[0]


def add_layernorm(
    x: Tensor, residual: Tensor, w_D: Tensor, b_D: Tensor | None, *, mask: Mask | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(LayerNorm of h, h) with h = residual + dropout(x). Raises ValueError as `layernorm` does; x is [B, T, D] with a
    mask.
    """
    return _run(x, w_D, b_D, residual, mask, eps, centred=True)


def add_rmsnorm(
    x: Tensor, residual: Tensor, w_D: Tensor, *, mask: Mask | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(RMSNorm of h, h) with h = residual + dropout(x). Raises ValueError as `rmsnorm` does; x is [B, T, D] with a
    mask.
    """
    return _run(x, w_D, None, residual, mask, eps, centred=False)
