# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
"""GELU of x + b, GPT-2's tanh form, which is y sigmoid(2 u) with u = sqrt(2/pi) (y + 0.044715 y^3) and y = x + b.

(Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2.)
Legend: R rows (all dims of x but the last), H features, P partial sums of db.
Numerics: fp32; db summed in fp32, in a fixed order.
Cost: bandwidth. Forward reads x and writes y; backward reads dy and x and writes dx, and sums db on the way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from megagpt.kernels.common import accumulator, check_floats, check_shape, on, statistics_dtype, sum_partials
from megagpt.kernels.tuning import tile

SLOPE, CUBE = tl.constexpr(2 * 0.7978845608028654), tl.constexpr(0.044715)


def gelu_reference(x: Tensor, b_H: Tensor | None) -> Tensor:
    """The definition, in the dtype it is given."""
    return F.gelu(x if b_H is None else x + b_H, approximate="tanh")


@triton.jit
def _forward(x, b, y, R, H, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr):
    """One program, a tile of ROWS rows and COLUMNS features."""
    blocks = tl.cdiv(H, COLUMNS)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    valid = (rows[:, None] < R) & (columns[None, :] < H)
    at = rows[:, None] * H + columns[None, :]
    value = tl.load(x + at, mask=valid, other=0.0).to(ACC)
    if b is not None:
        value += tl.load(b + columns, mask=columns < H, other=0.0).to(ACC)[None, :]
    out = value * tl.sigmoid((value + value * value * value * CUBE) * SLOPE)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=valid)


@triton.jit
def _backward(dy, x, b, dx, db, R, H, P, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr):
    """One program, COLUMNS features of every P-th group of ROWS rows."""
    blocks = tl.cdiv(H, COLUMNS)
    part = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    if b is not None:
        bias = tl.load(b + columns, mask=columns < H, other=0.0).to(ACC)[None, :]
    sums = tl.zeros([ROWS, COLUMNS], ACC)
    for group in range(part, tl.cdiv(R, ROWS), P):
        rows = (group * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        valid = (rows[:, None] < R) & (columns[None, :] < H)
        at = rows[:, None] * H + columns[None, :]
        value = tl.load(x + at, mask=valid, other=0.0).to(ACC)
        if b is not None:
            value += bias
        gate = tl.sigmoid((value + value * value * value * CUBE) * SLOPE)
        slope = gate + value * gate * (1 - gate) * (1 + value * value * (3 * CUBE)) * SLOPE
        grad = tl.load(dy + at, mask=valid, other=0.0).to(ACC) * slope
        tl.store(dx + at, grad.to(dx.dtype.element_ty), mask=valid)
        sums += grad
    if db is not None:
        tl.store(db + part.to(tl.int64) * H + columns, tl.sum(sums, 0), mask=columns < H)


@torch.library.custom_op("megagpt::gelu", mutates_args=())
def _gelu(x: Tensor, b: Tensor | None) -> Tensor:
    """gelu(x + b)."""
    H = x.shape[-1]
    R = x.numel() // H
    y = torch.empty_like(x)
    cut = tile("gelu_forward", x.dtype, 1, x.device)
    with on(x):
        _forward[(triton.cdiv(R, cut.rows) * triton.cdiv(H, cut.columns),)](
            x, b, y, R, H, ROWS=cut.rows, COLUMNS=cut.columns, ACC=accumulator(x.dtype), **cut.options()
        )
    return y


@_gelu.register_fake
def _(x, b):
    return torch.empty_like(x)


@torch.library.custom_op("megagpt::gelu_backward", mutates_args=())
def _gelu_backward(dy: Tensor, x: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """Dx and db (empty without a bias)."""
    H = x.shape[-1]
    R = x.numel() // H
    dy, dx = dy.contiguous(), torch.empty_like(x)
    cut = tile("gelu_backward", x.dtype, 1, x.device)
    groups = triton.cdiv(R, cut.rows)
    P = groups if b is None else max(1, min(groups, cut.programs // triton.cdiv(H, cut.columns)))
    db_PH = None if b is None else torch.empty(P, H, dtype=statistics_dtype(x.dtype), device=x.device)
    with on(x):
        _backward[(P * triton.cdiv(H, cut.columns),)](
            dy, x, b, dx, db_PH, R, H, P, ROWS=cut.rows, COLUMNS=cut.columns, ACC=accumulator(x.dtype),
            **cut.options(),
        )  # fmt: skip
    return dx, x.new_empty(0) if db_PH is None else sum_partials(db_PH, x.dtype)


@_gelu_backward.register_fake
def _(dy, x, b):
    return torch.empty_like(x), x.new_empty(0) if b is None else torch.empty_like(b)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy):
    x, b = ctx.saved_tensors
    dx, db = _gelu_backward(dy, x, b)
    return dx, None if b is None else db


_gelu.register_autograd(_differentiate, setup_context=_save)


def gelu(x: Tensor, b_H: Tensor | None = None) -> Tensor:
    """GELU of x + b, over any shape. Raises ValueError for shapes and dtypes that it lacks."""
    check_floats(x=x, b=b_H)
    if b_H is not None:
        check_shape("b", b_H, x.shape[-1:])
    return _gelu(x.contiguous(), b_H)
