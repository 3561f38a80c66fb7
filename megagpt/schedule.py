"""The learning rate as a function of tokens, so that it holds on any batch size and layout.

cosine    warm-up, half a cosine down to the floor at decay_tokens, then the floor   (Loshchilov & Hutter 2017,
arXiv:1608.03983; GPT-3's: Brown et al. 2020, arXiv:2005.14165, appendix B)
wsd       warm-up, stable, then a straight line down to the floor over the last wsd_decay of decay_tokens
(Hu et al. 2024, arXiv:2404.06395)
constant  warm-up, then optim.lr
"""

from __future__ import annotations

import math

from megagpt.config import Optim


def learning_rate(optim: Optim, *, tokens: int, total_tokens: int) -> float:
    """The rate of the step that brings the run to `tokens` tokens; `total_tokens` is train.tokens."""
    if tokens < optim.warmup_tokens:
        return optim.lr * tokens / optim.warmup_tokens
    if optim.schedule == "constant":
        return optim.lr
    end = total_tokens if optim.decay_tokens is None else optim.decay_tokens
    start: float = optim.warmup_tokens
    if optim.schedule == "wsd":
        start = max(start, end * (1 - optim.wsd_decay))
    if tokens >= end:
        remaining = 0.0
    elif tokens <= start:
        remaining = 1.0
    else:
        remaining = (end - tokens) / (end - start)
    if optim.schedule == "cosine":
        remaining = 0.5 * (1 - math.cos(math.pi * remaining))
    return optim.lr * (optim.lr_floor + (1 - optim.lr_floor) * remaining)
