# pyright: reportArgumentType=false, reportCallIssue=false
"""Rotary positions: each pair of features (i, i + K/2) of queries and keys turned by position * base^(-2i/K).

    a' = a cos - b sin,   b' = b cos + a sin                (Su et al. 2021, arXiv:2104.09864, with Llama's pairing)

Queries and keys go in one launch. The inverse is the same with -sin, so that the backward is the forward.
Legend: B batch, T tokens, N query heads, G key heads, K head width, H = K/2.
Numerics: angles, their sines and the turn in fp32 (fp64 for fp64).
Cost: reads and writes q and k once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagpt.kernels.common import accumulator, check_floats, check_shape, on, statistics_dtype
from megagpt.kernels.tuning import tile


def rotary_reference(q_BTNK: Tensor, k_BTGK: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The definition; `cos` and `sin` are [1 or B, T, K/2]."""

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        c, s = cos[:, :, None], sin[:, :, None]
        return torch.cat((a * c - b * s, b * c + a * s), dim=-1).to(x.dtype)

    return turned(q_BTNK), turned(k_BTGK)


@triton.jit
def _turn(x, out, cos, sin, heads, stride, HEADS: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """All heads of one token."""
    head, h = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK_H)[None, :]
    valid = (head < heads) & (h < H)
    a = tl.load(x + head * stride + h, mask=valid, other=0.0).to(cos.dtype)
    b = tl.load(x + head * stride + H + h, mask=valid, other=0.0).to(cos.dtype)
    to = out + head * (2 * H) + h
    tl.store(to, (a * cos - b * sin).to(out.dtype.element_ty), mask=valid)
    tl.store(to + H, (b * cos + a * sin).to(out.dtype.element_ty), mask=valid)


@triton.jit
def _rotate(
    q, k, q_out, k_out, cos, sin, T, N, G, angle_b, q_b, q_t, q_n, k_b, k_t, k_n,
    N_BLOCK: tl.constexpr, G_BLOCK: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program, one token."""
    token = tl.program_id(0).to(tl.int64)  # tokens * stride passes 2**31 at real sizes
    batch, place = token // T, token % T
    h = tl.arange(0, BLOCK_H)
    angle = batch * angle_b + place * H + h
    cos_H = tl.load(cos + angle, mask=h < H, other=0.0).to(ACC)[None, :]
    sin_H = tl.load(sin + angle, mask=h < H, other=0.0).to(ACC)[None, :]
    _turn(q + batch * q_b + place * q_t, q_out + token * (N * 2 * H), cos_H, sin_H, N, q_n, N_BLOCK, H, BLOCK_H)
    _turn(k + batch * k_b + place * k_t, k_out + token * (G * 2 * H), cos_H, sin_H, G, k_n, G_BLOCK, H, BLOCK_H)


@torch.library.custom_op("megagpt::rotary", mutates_args=())
def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Q and k, turned."""
    B, T, N, K = q.shape
    G = k.shape[2]
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    cut = tile("rotary", q.dtype, K, q.device)
    with on(q):
        _rotate[(B * T,)](
            q, k, q_out, k_out, cos, sin, T, N, G, cos.stride(0) if cos.shape[0] > 1 else 0, *q.stride()[:3],
            *k.stride()[:3], N_BLOCK=triton.next_power_of_2(N), G_BLOCK=triton.next_power_of_2(G), H=K // 2,
            BLOCK_H=triton.next_power_of_2(K // 2), ACC=accumulator(q.dtype), **cut.options(),
        )  # fmt: skip
    return q_out, k_out


@_rotary.register_fake
def _(q, k, cos, sin):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[2:])


def _differentiate(ctx, dq, dk):
    cos, sin = ctx.saved_tensors
    return *_rotary(dq, dk, cos, -sin), None, None


_rotary.register_autograd(_differentiate, setup_context=_save)


def rotary(q_BTNK: Tensor, k_BTGK: Tensor, positions: Tensor, base: float) -> tuple[Tensor, Tensor]:
    """Q and k, turned to `positions`, which are [T] or [B, T]. Raises ValueError for an odd K and shapes it lacks."""
    check_floats(q=q_BTNK, k=k_BTGK)
    if q_BTNK.dim() != 4 or q_BTNK.shape[-1] % 2:
        raise ValueError(f"q has shape {tuple(q_BTNK.shape)}, but must be [B, T, N, K] with an even K.")
    B, T, _, K = q_BTNK.shape
    check_shape("k", k_BTGK, (B, T, k_BTGK.shape[2], K))
    check_shape("positions", positions, (T,) if positions.dim() == 1 else (B, T))
    dtype = statistics_dtype(q_BTNK.dtype)
    frequency = base ** -(torch.arange(0, K, 2, device=q_BTNK.device).to(dtype) / K)
    angle = positions.view(-1, T)[..., None].to(dtype) * frequency
    return _rotary(q_BTNK, k_BTGK, angle.cos(), angle.sin())
