"""The small modules that own the model's weights, one matrix or vector each.

Parallel layouts cut or replace these; the layers of `model.py` only wire them. Weights are created without a value,
since every one is drawn by its global name afterwards (`model.initialise`).
Letters: B batch, T tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.ops import Mask, Operators
from megagpt.philox import key_of


class Linear(nn.Module):
    """y = x W' + b."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, weight: nn.Parameter | None = None) -> None:
        """`weight` is another module's, to be shared."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs)) if weight is None else weight
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class GeluLinear(Linear):
    """y = gelu(x W' + b), as `ops.linear_gelu`."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, ops: Operators) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear_gelu(x, self.weight, self.bias)


class Table(nn.Module):
    """One row of features for each index."""

    def __init__(self, rows: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, features))

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)


class LayerNorm(nn.Module):
    """`ops.layernorm` with its weight and bias."""

    def __init__(self, features: int, *, eps: float, ops: Operators) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features))
        self.bias = nn.Parameter(torch.empty(features))
        self.eps, self.ops = eps, ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.layernorm(x, self.weight, self.bias, self.eps)


class AddLayerNorm(LayerNorm):
    """`ops.add_layernorm` with its weight and bias: (LayerNorm of h, h) with h = residual + dropout(x)."""

    def forward(self, x_BTD: Tensor, residual_BTD: Tensor, mask: Mask | None) -> tuple[Tensor, Tensor]:
        return self.ops.add_layernorm(x_BTD, residual_BTD, self.weight, self.bias, mask=mask, eps=self.eps)


class RMSNorm(nn.Module):
    """`ops.rmsnorm` with its weight."""

    def __init__(self, features: int, *, eps: float, ops: Operators) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features))
        self.eps, self.ops = eps, ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rmsnorm(x, self.weight, self.eps)


class AddRMSNorm(RMSNorm):
    """`ops.add_rmsnorm` with its weight: (RMSNorm of h, h) with h = residual + dropout(x)."""

    def forward(self, x_BTD: Tensor, residual_BTD: Tensor, mask: Mask | None) -> tuple[Tensor, Tensor]:
        return self.ops.add_rmsnorm(x_BTD, residual_BTD, self.weight, mask=mask, eps=self.eps)


class Dropout(nn.Module):
    """Dropout at one site of the model: the same elements of a sample on every layout, and again when recomputed."""

    def __init__(self, rate: float, site: str, *, seed: int, ops: Operators) -> None:
        super().__init__()
        self.rate, self.ops = rate, ops
        self.key = key_of(seed, "dropout", site)

    def mask(self, samples_B: Tensor) -> Mask | None:
        """None where nothing is dropped: outside training, or at rate 0."""
        return Mask(self.rate, self.key, samples_B) if self.training and self.rate > 0 else None

    def forward(self, x_BTD: Tensor, samples_B: Tensor) -> Tensor:
        mask = self.mask(samples_B)
        return x_BTD if mask is None else self.ops.dropout(x_BTD, mask=mask)


class AddDropout(Dropout):
    """`ops.add_residual`: residual + dropout(x)."""

    def forward(self, x_BTD: Tensor, residual_BTD: Tensor, samples_B: Tensor) -> Tensor:
        return self.ops.add_residual(x_BTD, residual_BTD, mask=self.mask(samples_B))
