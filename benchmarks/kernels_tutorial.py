# pyright: reportArgumentType=false, reportCallIssue=false
"""Our attention backward beside the design of Triton's tutorial 06, both compiled for an H100; no GPU needed.

    python -m benchmarks.kernels_tutorial

The design is written here anew and smaller: one kernel whose programs make dk and dv of a tile of keys and then dq of
a tile of queries, each in one loop over masked tiles and one over whole tiles, with the tutorial's tiles (32 x 128 and
128 x 32) and its four warps and five stages. Printed: registers, spill loads and stores of all code, and what ptxas
says of serialised tensor-core instructions, at width 128 in bf16.
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl

from megagpt.kernels.attention import attention
from megagpt.kernels.resources import compiling_for, read


@triton.jit
def _keys_walk(dk, dv, k, v, q, do, lse, delta, first, stop, columns, K: tl.constexpr, M: tl.constexpr,
               MASK: tl.constexpr):  # fmt: skip
    """Adds the queries [first, stop) to dk and dv."""
    features = tl.arange(0, K)
    for row in range(first, stop, M):
        rows = row + tl.arange(0, M)
        qt = tl.load(q + rows[None, :] * K + features[:, None])
        pt = tl.math.exp2(tl.dot(k, qt) - tl.load(lse + rows)[None, :])
        if MASK:
            pt = tl.where(rows[None, :] >= columns[:, None], pt, 0.0)
        grad = tl.load(do + rows[:, None] * K + features[None, :])
        dv += tl.dot(pt.to(q.dtype.element_ty), grad)
        dp = tl.dot(v, tl.trans(grad))
        ds = pt * (dp - tl.load(delta + rows)[None, :])
        dk += tl.dot(ds.to(q.dtype.element_ty), tl.trans(qt))
    return dk, dv


@triton.jit
def _queries_walk(dq, q, do, lse, delta, k, v, first, stop, rows, K: tl.constexpr, C: tl.constexpr,
                  MASK: tl.constexpr):  # fmt: skip
    """Adds the keys [first, stop) to dq."""
    features = tl.arange(0, K)
    for column in range(first, stop, C):
        columns = column + tl.arange(0, C)
        kt = tl.load(k + columns[None, :] * K + features[:, None])
        vt = tl.load(v + columns[None, :] * K + features[:, None])
        p = tl.math.exp2(tl.dot(q, kt) - lse[:, None])
        if MASK:
            p = tl.where(rows[:, None] >= columns[None, :], p, 0.0)
        ds = p * (tl.dot(do, vt) - delta[:, None])
        dq += tl.dot(ds.to(k.dtype.element_ty), tl.trans(kt))
    return dq


@triton.jit
def both_in_one(q, k, v, do, lse, delta, dq, dk, dv, T, K: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr):
    """One program: dk and dv of WIDE keys, then dq of WIDE queries, of one head's causal attention."""
    start = tl.program_id(0) * WIDE
    head = tl.program_id(1).to(tl.int64) * T
    features = tl.arange(0, K)
    at = start + tl.arange(0, WIDE)
    tile = head * K + at[:, None] * K + features[None, :]
    keys, values = tl.load(k + tile), tl.load(v + tile)
    zero = tl.zeros([WIDE, K], tl.float32)
    base = head * K
    dk_sum, dv_sum = _keys_walk(
        zero, zero, keys, values, q + base, do + base, lse + head, delta + head, start, start + WIDE, at,
        K, NARROW, True,
    )  # fmt: skip
    dk_sum, dv_sum = _keys_walk(
        dk_sum, dv_sum, keys, values, q + base, do + base, lse + head, delta + head, start + WIDE, T, at, K, NARROW,
        False,
    )  # fmt: skip
    tl.store(dk + tile, dk_sum.to(dk.dtype.element_ty))
    tl.store(dv + tile, dv_sum.to(dv.dtype.element_ty))
    queries, grads = tl.load(q + tile), tl.load(do + tile)
    sums_lse, sums_delta = tl.load(lse + head + at), tl.load(delta + head + at)
    dq_sum = _queries_walk(
        zero, queries, grads, sums_lse, sums_delta, k + base, v + base, start, start + WIDE, at, K, NARROW, True
    )
    dq_sum = _queries_walk(
        dq_sum, queries, grads, sums_lse, sums_delta, k + base, v + base, 0, start, at, K, NARROW, False
    )
    tl.store(dq + tile, dq_sum.to(dq.dtype.element_ty))


def main() -> None:
    x = torch.zeros(1, 8, 256, 128, dtype=torch.bfloat16)
    row = torch.zeros(1, 8, 256)
    q, k, v = (torch.zeros(1, 256, 8, 128, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with compiling_for("sm90") as theirs:
        both_in_one[(2, 8)](x, x, x, x, row, row, x, x, x, 256, K=128, NARROW=32, WIDE=128, num_warps=4, num_stages=5)
    with compiling_for("sm90") as ours:
        o = attention(q, k, v)
        o.backward(torch.zeros_like(o))
    sys.stdout.write(f"Triton {triton.__version__}, sm_90, bf16, width 128\n")
    for kernel in (*theirs, *(each for each in ours if each.metadata.name.startswith("backward"))):
        found = read(kernel, "sm90")
        loads, stores = found.count("LDL", hot=False), found.count("STL", hot=False)
        remarks = ", ".join(found.notes) or "none"
        sys.stdout.write(
            f"{found.kernel:17} registers {found.registers}, spill loads {loads}, stores {stores}, "
            f"serialised: {remarks}\n"
        )


if __name__ == "__main__":
    main()
