"""Philox4x32-10: random words as a pure function of (key, counter)  (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3", SC11, section 3.3).

A generator that is a function has no state to save, to keep apart between ranks, or to rewind for recomputation.
Numerics: 32-bit words are carried in int64. A product of two words wraps as int64, but its 64 bits are those of the
unsigned product, so that its halves are exact. Cost: about 110 integer operations for four words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 0xFFFF_FFFF  # the low 32 bits, and the largest word
_MULTIPLIERS = (0xD251_1F53, 0xCD9E_8D57)
_KEY_STEPS = (0x9E37_79B9, 0xBB67_AE85)
_ROUNDS = 10


def key_of(*parts: object) -> int:
    """The 64-bit key of a named stream: the first 8 bytes, little endian, of SHA-256 over the parts joined by "/"."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def philox(counter: Sequence[Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter.

    `counter` is four int64 tensors of values from 0 to 2**32 - 1 that broadcast together, `key` is below 2**64.
    Returns int64 tensors of the broadcast shape. The first two rounds stay in smaller shapes where the counter is
    broadcast, which makes it cheaper than an expanded one.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & WORD, key >> 32
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = _high(second) ^ (c1 ^ k0), _high(first) ^ (c3 ^ k1)
        c1, c3 = second & WORD, first & WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & WORD, (k1 + _KEY_STEPS[1]) & WORD
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    return c0, c1, c2, c3


def _high(product: Tensor) -> Tensor:
    return (product >> 32).bitwise_and_(WORD)
