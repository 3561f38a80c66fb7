# pyright: reportArgumentType=false, reportCallIssue=false
"""Counter-based dropout: which elements of a tile stay, as a function of where they are in the run.

An element stays if its 32-bit word is at least round(rate * 2**32). The word is output `column % 4` of Philox4x32-10
with the mask's 64-bit key and the counter (column // 4, position, sample, head), so that a mask never depends on
tiles, ranks or recomputation, and equals the one of megagpt.ops bit for bit.
Legend: R rows of a tile, C its columns (a multiple of 4).
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
"""

from __future__ import annotations

import triton
import triton.language as tl


def threshold(rate: float) -> int:
    """The smallest 32-bit word that stays at a dropout rate; 0 keeps everything. Raises ValueError outside [0, 1)."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout rate is {rate}, but must be from 0 to below 1.")
    return min(round(rate * 2**32), 2**32 - 1)


@triton.jit
def kept(key, group_C4, position_R, sample, head, THRESHOLD: tl.constexpr):
    """[R, C] of bool: what stays in columns 4 * group_C4 + (0, 1, 2, 3) at the given positions.

    `sample` is one number or [R] of them; of all counters the low 32 bits count.
    """
    zero = tl.zeros([position_R.shape[0], group_C4.shape[0]], tl.int32)
    sample_R = (sample + 0 * position_R).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(
        key,
        zero + group_C4.to(tl.int32)[None, :],
        zero + position_R.to(tl.int32)[:, None],
        zero + sample_R[:, None],
        zero + head.to(tl.int32),
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # the last two dims read w0 w1 w2 w3, row by row
    return tl.reshape(words, [zero.shape[0], 4 * zero.shape[1]]) >= THRESHOLD
