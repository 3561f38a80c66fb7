# pyright: reportArgumentType=false, reportCallIssue=false
"""SwiGLU: y = silu(gate) * up, of the first and the second half of the last dim  (Shazeer 2020, arXiv:2002.05202).

Legend: R rows (all dims but the last), H features of y, half of those of the input.
Numerics: fp32. Cost: bandwidth. Forward reads 2 R H and writes R H; backward reads 3 R H and writes 2 R H.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from megagpt.kernels.common import accumulator, check_floats, on
from megagpt.kernels.tuning import tile


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The definition, in the dtype it is given."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@triton.jit
def _place(R, H, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile of this program: (offsets in y, offsets of the gate, which of them exist)."""
    blocks = tl.cdiv(H, COLUMNS)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    valid = (rows[:, None] < R) & (columns[None, :] < H)
    return rows[:, None] * H + columns[None, :], rows[:, None] * (2 * H) + columns[None, :], valid


@triton.jit
def _forward(gate_up, y, R, H, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr):
    """One program, a tile of ROWS rows and COLUMNS features."""
    to, at, valid = _place(R, H, ROWS, COLUMNS)
    gate = tl.load(gate_up + at, mask=valid, other=0.0).to(ACC)
    up = tl.load(gate_up + at + H, mask=valid, other=0.0).to(ACC)
    tl.store(y + to, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=valid)


@triton.jit
def _backward(dy, gate_up, dgate_up, R, H, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr):
    """One program, a tile of ROWS rows and COLUMNS features."""
    to, at, valid = _place(R, H, ROWS, COLUMNS)
    grad = tl.load(dy + to, mask=valid, other=0.0).to(ACC)
    gate = tl.load(gate_up + at, mask=valid, other=0.0).to(ACC)
    up = tl.load(gate_up + at + H, mask=valid, other=0.0).to(ACC)
    s = tl.sigmoid(gate)
    dgate = grad * up * s * (1 + gate * (1 - s))
    tl.store(dgate_up + at, dgate.to(dgate_up.dtype.element_ty), mask=valid)
    tl.store(dgate_up + at + H, (grad * gate * s).to(dgate_up.dtype.element_ty), mask=valid)


@torch.library.custom_op("megagpt::swiglu", mutates_args=())
def _swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up."""
    H = gate_up.shape[-1] // 2
    R = gate_up.numel() // (2 * H)
    y = gate_up.new_empty(*gate_up.shape[:-1], H)
    cut = tile("swiglu_forward", y.dtype, 1, y.device)
    with on(y):
        _forward[(triton.cdiv(R, cut.rows) * triton.cdiv(H, cut.columns),)](
            gate_up, y, R, H, ROWS=cut.rows, COLUMNS=cut.columns, ACC=accumulator(y.dtype), **cut.options()
        )
    return y


@_swiglu.register_fake
def _(gate_up):
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("megagpt::swiglu_backward", mutates_args=())
def _swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """The gradients of gate and up, side by side."""
    H = dy.shape[-1]
    R = dy.numel() // H
    dy, dgate_up = dy.contiguous(), torch.empty_like(gate_up)
    cut = tile("swiglu_backward", dy.dtype, 1, dy.device)
    with on(dy):
        _backward[(triton.cdiv(R, cut.rows) * triton.cdiv(H, cut.columns),)](
            dy, gate_up, dgate_up, R, H, ROWS=cut.rows, COLUMNS=cut.columns, ACC=accumulator(dy.dtype),
            **cut.options(),
        )  # fmt: skip
    return dgate_up


@_swiglu_backward.register_fake
def _(dy, gate_up):
    return torch.empty_like(gate_up)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy):
    return _swiglu_backward(dy, *ctx.saved_tensors)


_swiglu.register_autograd(_differentiate, setup_context=_save)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the halves of the last dim. Raises ValueError for an odd last dim."""
    check_floats(gate_up=gate_up)
    if gate_up.shape[-1] % 2 or gate_up.shape[-1] == 0:
        raise ValueError(f"gate_up has {gate_up.shape[-1]} features, but must have an even number.")
    return _swiglu(gate_up.contiguous())
