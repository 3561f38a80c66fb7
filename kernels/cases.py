"""Launches that bring out every kernel in the forms that models use, on tensors of zeros: what the reports look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megagpt.kernels import attention, cross_entropy, gelu, norm, residual, rotary, swiglu

TOKENS = 512


@dataclass(frozen=True)
class Mask:
    """A dropout mask to compile for."""

    rate: float
    key: int
    samples_B: Tensor
    first_token: int = 0

    def keep_BNTC(self, heads: int, tokens: int, columns: int) -> Tensor:
        return torch.ones(len(self.samples_B), heads, tokens, columns, dtype=torch.bool)


def _mask() -> Mask:
    return Mask(0.1, 0x1234_5678_9ABC_DEF0, torch.zeros(1, dtype=torch.int64))


def _zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def _attention(width: int, dtype: torch.dtype, *, heads: int = 2, **options: Any) -> None:
    qkv = _zeros(1, TOKENS, heads + 2, width, dtype=dtype)
    q, k, v = qkv.split((heads, 1, 1), 2)
    o = attention.attention(q, k, v, **options)
    o.backward(torch.zeros_like(o))


def _norm(width: int, dtype: torch.dtype, *, mask: Mask | None = None) -> None:
    x, residual_BTD = _zeros(1, 256, width, dtype=dtype), torch.zeros(1, 256, width, dtype=dtype)
    w, b = _zeros(width, dtype=dtype), _zeros(width, dtype=dtype)
    y, h = norm.add_layernorm(x, residual_BTD, w, b, mask=mask)
    (y + h).backward(torch.zeros_like(y))


def _rms(width: int, dtype: torch.dtype) -> None:
    y = norm.rmsnorm(_zeros(256, width, dtype=dtype), _zeros(width, dtype=dtype))
    y.backward(torch.zeros_like(y))


def _loss(dtype: torch.dtype, smoothing: float) -> None:
    logits, targets = _zeros(16, 50_304, dtype=dtype), torch.zeros(16, dtype=torch.int64)
    cross_entropy.cross_entropy(logits, targets, vocabulary=50_257, smoothing=smoothing).sum().backward()


def _elementwise(dtype: torch.dtype) -> None:
    x, b = _zeros(1, 256, 1024, dtype=dtype), _zeros(1024, dtype=dtype)
    grad = torch.zeros_like(x)
    for y in (gelu.gelu(x, b), gelu.gelu(x), residual.add_residual(x, grad, b_D=b, mask=_mask())):
        y.backward(grad)
    residual.dropout(x, _mask()).backward(grad)
    y = swiglu.swiglu(x)
    y.backward(torch.zeros_like(y))
    q, k = rotary.rotary(
        _zeros(1, 256, 16, 128, dtype=dtype), _zeros(1, 256, 4, 128, dtype=dtype), torch.arange(256), 1e4
    )
    torch.autograd.backward((q, k), (torch.zeros_like(q), torch.zeros_like(k)))


def cases(dtype: torch.dtype, *, full: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, what launches its kernels). The full report has every width of the tables and every fusion."""
    start = torch.zeros(1, TOKENS, dtype=torch.int32)
    yield "attention 64", lambda: _attention(64, dtype)
    yield "attention 128", lambda: _attention(128, dtype)
    yield "norm 4,096", lambda: _norm(4096, dtype)
    yield "cross entropy", lambda: _loss(dtype, 0.0)
    if not full:
        return
    for width in (16, 32, 80, 96, 256):
        yield f"attention {width}", lambda width=width: _attention(width, dtype)
    for width in (64, 128, 256):
        yield f"attention {width} dropout", lambda width=width: _attention(width, dtype, dropout=_mask())
    yield "attention 128 documents", lambda: _attention(128, dtype, document_start_BT=start, window=128)
    yield "attention 128 full documents", lambda: _attention(128, dtype, document_start_BT=start, causal=False)
    yield "attention 128 softcap", lambda: _attention(128, dtype, softcap=30.0)
    for width in (768, 2048, 5120, 8192, 12_288, 16_384):
        yield f"norm {width:,}", lambda width=width: _norm(width, dtype)
    for width in (64, 128, 4096, 12_288):
        yield f"rmsnorm {width:,}", lambda width=width: _rms(width, dtype)
    yield "norm 1,024 dropout", lambda: _norm(1024, dtype, mask=_mask())
    yield "cross entropy smoothed", lambda: _loss(dtype, 0.1)
    yield "elementwise", lambda: _elementwise(dtype)
