# pyright: reportArgumentType=false, reportCallIssue=false
"""The end of a branch: y = residual + dropout(x + b), each of residual, dropout and b optional.

Legend: B batch, T tokens, D features, R = B T rows, P partial sums of db.
Numerics: fp32, rounded once; db summed in fp32, in a fixed order. The mask is computed again, not stored.
Cost: bandwidth. Forward reads x and residual and writes y; backward reads dy and writes dx; dresidual is dy itself.
Source: Srivastava et al. 2014, JMLR 15 (dropout).
"""

from __future__ import annotations

import torch
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


def residual_reference(x_BTD: Tensor, residual_BTD: Tensor | None, b_D: Tensor | None, mask: Mask | None) -> Tensor:
    """The definition, in the dtype it is given."""
    y_BTD = x_BTD if b_D is None else x_BTD + b_D
    if mask is not None:
        keep_BTD = mask.keep_BNTC(1, x_BTD.shape[1], x_BTD.shape[2])[:, 0]
        y_BTD = (y_BTD / (1 - mask.rate)).masked_fill(~keep_BTD, 0)
    return y_BTD if residual_BTD is None else residual_BTD + y_BTD


@triton.jit
def _dropped(
    values, samples, key, first_token, rows, first, R, T,
    C: tl.constexpr, RATE: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """`values` of the given rows and the C columns from `first` on, after dropout."""
    sample = tl.load(samples + rows // T, mask=rows < R, other=0)
    token = first_token + rows % T
    keep = kept(key, first // 4 + tl.arange(0, C // 4), token, sample, tl.zeros([], tl.int32), THRESHOLD)
    return tl.where(keep, values * (1 / (1 - RATE)), 0.0)


@triton.jit(do_not_specialize=["key", "first_token"])
def _forward(
    x, residual, b, y, samples, key, first_token, R, T, D,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RATE: tl.constexpr, THRESHOLD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program, a tile of ROWS rows and COLUMNS features."""
    blocks = tl.cdiv(D, COLUMNS)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) % blocks * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    valid = (rows[:, None] < R) & (columns[None, :] < D)
    at = rows[:, None] * D + columns[None, :]
    value = tl.load(x + at, mask=valid, other=0.0).to(ACC)
    if b is not None:
        value += tl.load(b + columns, mask=columns < D, other=0.0).to(ACC)[None, :]
    if RATE > 0:
        value = _dropped(value, samples, key, first_token, rows, first, R, T, COLUMNS, RATE, THRESHOLD)
    if residual is not None:
        value += tl.load(residual + at, mask=valid, other=0.0).to(ACC)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["key", "first_token"])
def _backward(
    dy, dx, db, samples, key, first_token, R, T, D, P,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RATE: tl.constexpr, THRESHOLD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program, COLUMNS features of every P-th group of ROWS rows."""
    blocks = tl.cdiv(D, COLUMNS)
    part = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    sums = tl.zeros([ROWS, COLUMNS], ACC)
    for group in range(part, tl.cdiv(R, ROWS), P):
        rows = (group * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        valid = (rows[:, None] < R) & (columns[None, :] < D)
        at = rows[:, None] * D + columns[None, :]
        grad = tl.load(dy + at, mask=valid, other=0.0).to(ACC)
        if RATE > 0:
            grad = _dropped(grad, samples, key, first_token, rows, first, R, T, COLUMNS, RATE, THRESHOLD)
        tl.store(dx + at, grad.to(dx.dtype.element_ty), mask=valid)
        sums += grad
    if db is not None:
        tl.store(db + part.to(tl.int64) * D + columns, tl.sum(sums, 0), mask=columns < D)


@torch.library.custom_op("megagpt::residual", mutates_args=())
def _residual(
    x: Tensor, residual: Tensor | None, b: Tensor | None, samples: Tensor | None, rate: float, key: int,
    first_token: int,
) -> Tensor:  # fmt: skip
    """Residual + dropout(x + b); the rows are the tokens from `first_token` on."""
    B, T, D = x.shape
    y = torch.empty_like(x)
    cut = tile("residual_forward", x.dtype, 1, x.device)
    with on(x):
        _forward[(triton.cdiv(B * T, cut.rows) * triton.cdiv(D, cut.columns),)](
            x, residual, b, y, samples, key, first_token, B * T, T, D, ROWS=cut.rows, COLUMNS=cut.columns, RATE=rate,
            THRESHOLD=threshold(rate), ACC=accumulator(x.dtype), **cut.options(),
        )  # fmt: skip
    return y


@_residual.register_fake
def _(x, residual, b, samples, rate, key, first_token):
    return torch.empty_like(x)


@torch.library.custom_op("megagpt::residual_backward", mutates_args=())
def _residual_backward(
    dy: Tensor, samples: Tensor | None, rate: float, key: int, first_token: int, has_bias: bool
) -> tuple[Tensor, Tensor]:
    """Dx and db (empty without a bias)."""
    dy = dy.contiguous()
    B, T, D = dy.shape
    dx = torch.empty_like(dy)
    cut = tile("residual_backward", dy.dtype, 1, dy.device)
    groups = triton.cdiv(B * T, cut.rows)
    P = max(1, min(groups, cut.programs // triton.cdiv(D, cut.columns))) if has_bias else groups
    db_PD = torch.empty(P, D, dtype=statistics_dtype(dy.dtype), device=dy.device) if has_bias else None
    with on(dy):
        _backward[(P * triton.cdiv(D, cut.columns),)](
            dy, dx, db_PD, samples, key, first_token, B * T, T, D, P, ROWS=cut.rows, COLUMNS=cut.columns, RATE=rate,
            THRESHOLD=threshold(rate), ACC=accumulator(dy.dtype), **cut.options(),
        )  # fmt: skip
    return dx, dy.new_empty(0) if db_PD is None else sum_partials(db_PD, dy.dtype)


@_residual_backward.register_fake
def _(dy, samples, rate, key, first_token, has_bias):
    return torch.empty_like(dy), dy.new_empty(dy.shape[-1] if has_bias else 0)


def _save(ctx, inputs, output) -> None:
    _, residual, b, samples, *ctx.dropout = inputs
    ctx.save_for_backward(samples)
    ctx.has_residual, ctx.has_bias = residual is not None, b is not None


def _differentiate(ctx, dy):
    if ctx.dropout[0] == 0 and not ctx.has_bias:
        return dy, dy if ctx.has_residual else None, *[None] * 5
    dx, db = _residual_backward(dy, *ctx.saved_tensors, *ctx.dropout, ctx.has_bias)
    return dx, dy if ctx.has_residual else None, db if ctx.has_bias else None, None, None, None, None


_residual.register_autograd(_differentiate, setup_context=_save)


def add_residual(
    x_BTD: Tensor, residual_BTD: Tensor | None, *, b_D: Tensor | None = None, mask: Mask | None = None
) -> Tensor:
    """Residual + dropout(x + b). Raises ValueError for shapes and dtypes that it lacks."""
    check_floats(x=x_BTD, residual=residual_BTD, b=b_D)
    if x_BTD.dim() != 3:
        raise ValueError(f"x has shape {tuple(x_BTD.shape)}, but must be [B, T, D].")
    if residual_BTD is not None:
        check_shape("residual", residual_BTD, x_BTD.shape)
        residual_BTD = residual_BTD.contiguous()
    if b_D is not None:
        check_shape("b", b_D, x_BTD.shape[-1:])
    samples, rate, key, first_token = None, 0.0, 0, 0
    if mask is not None and mask.rate > 0:
        check_shape("mask.samples_B", mask.samples_B, x_BTD.shape[:1])
        samples, rate, key, first_token = mask.samples_B, mask.rate, signed(mask.key), mask.first_token
    return _residual(x_BTD.contiguous(), residual_BTD, b_D, samples, rate, key, first_token)


def dropout(x_BTD: Tensor, mask: Mask) -> Tensor:
    """`x` with the elements outside the mask at 0 and the others over 1 - rate. Raises ValueError likewise."""
    return add_residual(x_BTD, None, mask=mask)
