"""The ledger: what a model costs in parameters, floating-point operations, bytes and hours. Pure arithmetic.

Letters: B batch, T tokens (the context), D width, H hidden, N query heads, G key and value heads, K head width,
V vocabulary, L layers, W window.

A multiplication and the addition that follows are two FLOPs. Forward, for one token:

    block      2 D K (N + 2G)  queries, keys, values
             + 2 N K D         output of attention
             + 4 N K S         scores and weighted values over the S tokens that this token sees on average
             + 2 m D H         feed-forward, m = 2 matrices (gelu) or 3 (swiglu)
    head       2 D V

S is exact: a dense causal layer of T tokens has T (T + 1) / 2 visible pairs, a banded one W (W + 1) / 2 + (T - W) W,
and S is the pairs over T. Masked pairs are never counted, whether or not a kernel wastes time on them. The backward
costs twice the forward: one product for the inputs' gradient, one for the weights'. Norms, activations, softmax, the
embedding's look-up and the optimizer are left out, as is usual; so are the scores that a fused attention kernel
computes again in its backward. MFU counts forward and backward; HFU adds what train.recompute computes again.

Sources: Kaplan et al. 2020, arXiv:2001.08361, table 1; Narayanan et al. 2021, arXiv:2104.04473, section 5 (HFU with
full recomputation); Chowdhery et al. 2022, arXiv:2204.02311, appendix B (MFU). docs/ledger.md works an example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megagpt.config import Model

Recompute = Literal["none", "selective", "full"]
Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Trainable numbers of one model, by part; a tied matrix is counted once, in the embedding."""

    embedding: int
    positions: int
    attention: int
    feed_forward: int
    norms: int
    head: int

    def total(self) -> int:
        return self.embedding + self.positions + self.attention + self.feed_forward + self.norms + self.head


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations of one token on its way through training."""

    forward: float
    backward: float
    recomputed: float

    def useful(self) -> float:
        """Forward and backward: what MFU counts."""
        return self.forward + self.backward

    def hardware(self) -> float:
        """With what the backward computes again: what HFU counts."""
        return self.forward + self.backward + self.recomputed


@dataclass(frozen=True, kw_only=True)
class TrainingBytes:
    """Bytes that one rank keeps for its model from step to step; activations and communication come on top."""

    weights: float
    gradients: float
    masters: float
    moments: float

    def total(self) -> float:
        return self.weights + self.gradients + self.masters + self.moments


def parameters(model: Model) -> Parameters:
    """Count the parameters of `model`; the vocabulary is the model's own, without rows added for a layout."""
    D, H, K = model.width, model.feed_forward_width(), model.head_width()
    query, key_value = model.heads * K, model.key_value_heads() * K
    qkv_bias = query + 2 * key_value if model.biases == "all" else 0
    block_bias = D if model.biases != "none" else 0
    qk_norm = 2 * K if model.qk_norm else 0
    attention = D * (query + 2 * key_value) + query * D + qkv_bias + block_bias
    inner = H if model.feed_forward == "gelu" else 2 * H
    feed_forward = D * inner + H * D + (inner + D if model.biases != "none" else 0)
    norm = 2 * D if model.norm == "layernorm" else D
    return Parameters(
        embedding=model.vocabulary * D,
        positions=model.context * D if model.positions == "learned" else 0,
        attention=model.layers * attention,
        feed_forward=model.layers * feed_forward,
        norms=model.layers * (2 * norm + qk_norm) + norm,
        head=0 if model.tied else model.vocabulary * D,
    )


def checkpoint_bytes(model: Model) -> int:
    """What a checkpoint of `model` stores: fp32 weight and both of Adam's moments of every parameter."""
    return 3 * 4 * parameters(model).total()


def visible_pairs(tokens: int, window: int | None = None) -> int:
    """Pairs (query, key) of one causal document of `tokens` tokens, each seeing itself and `window` - 1 before it."""
    if window is None or window >= tokens:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window


def flops_per_token(model: Model, recompute: Recompute = "none", documents: Sequence[int] | None = None) -> Flops:
    """FLOPs that training spends on one token of a full context; the module's docstring has the formula.

    `documents` are the token counts of the documents in some sequences, for runs that keep attention inside each
    document (data.document_mask); None is one document a context. Raises ValueError if a count is not positive.
    """
    lengths = [model.context] if documents is None else list(documents)
    if not lengths or min(lengths) < 1:
        raise ValueError(f"documents must be positive token counts, and at least one: got {lengths[:8]}")
    dense, banded = (
        sum(visible_pairs(tokens, window) for tokens in lengths) / sum(lengths) for window in (None, model.window)
    )
    D, H, K, N = model.width, model.feed_forward_width(), model.head_width(), model.heads
    projections = 2.0 * D * K * (N + 2 * model.key_value_heads()) + 2.0 * N * K * D
    visible = sum(dense if model.layer_window(layer) is None else banded for layer in range(model.layers))
    attention = model.layers * projections + 4.0 * N * K * visible
    up = model.layers * 2.0 * D * H * (1 if model.feed_forward == "gelu" else 2)
    down = model.layers * 2.0 * D * H
    forward = attention + up + down + 2.0 * D * model.vocabulary
    # Recomputing stops before the last matrix of its region: the backward needs that product's input, not its result.
    recomputed = {"none": 0.0, "selective": up, "full": attention + up}[recompute]
    return Flops(forward=forward, backward=2 * forward, recomputed=recomputed)


def layer_flops(model: Model) -> list[float]:
    """Forward FLOPs of one token in each layer [embedding, *blocks, head]; a look-up costs none."""
    D, H, K, N = model.width, model.feed_forward_width(), model.head_width(), model.heads
    projections = 2.0 * D * K * (N + 2 * model.key_value_heads()) + 2.0 * N * K * D
    feed_forward = 2.0 * D * H * (2 if model.feed_forward == "gelu" else 3)
    blocks = []
    for layer in range(model.layers):
        visible = visible_pairs(model.context, model.layer_window(layer)) / model.context
        blocks.append(projections + 4.0 * N * K * visible + feed_forward)
    return [0.0, *blocks, 2.0 * D * model.vocabulary]


def layer_parameters(model: Model) -> list[int]:
    """Parameters that each layer [embedding, *blocks, head] keeps where it is alone: a tied head has its own copy."""
    found, last_norm = parameters(model), model.width * (2 if model.norm == "layernorm" else 1)
    block = (found.attention + found.feed_forward + found.norms - last_norm) // model.layers
    head = model.vocabulary * model.width + last_norm
    return [found.embedding + found.positions, *[block] * model.layers, head]


def mfu(flops: Flops, *, tokens_per_s: float, peak_flops_per_s: float) -> float:
    """Model FLOPs utilisation: the share of the peak of all devices together that goes into useful products."""
    return flops.useful() * tokens_per_s / peak_flops_per_s


def hfu(flops: Flops, *, tokens_per_s: float, peak_flops_per_s: float) -> float:
    """Hardware FLOPs utilisation: as `mfu`, with recomputed activations counted as work."""
    return flops.hardware() * tokens_per_s / peak_flops_per_s


def training_bytes(count: int, *, precision: Precision, zero_stage: int, data: int) -> TrainingBytes:
    """Bytes one rank keeps for `count` parameters (its own cut of the model) among `data` data-parallel ranks.

    AdamW keeps two fp32 moments a parameter, and an fp32 master of the weights unless plain fp32 (ZeRO 0) updates
    them in place. ZeRO 1 cuts masters and moments over the data-parallel ranks, 2 also gradients, 3 also weights
    (Rajbhandari et al. 2020, arXiv:1910.02054, section 3). Gradients are kept in the weights' precision.
    Raises ValueError for another stage or fewer than one rank.
    """
    if zero_stage not in (0, 1, 2, 3) or data < 1:
        raise ValueError(f"zero_stage must be 0 to 3 and data at least 1: got {zero_stage} and {data}")
    width = 4 if precision == "fp32" else 2
    optimizer_ranks, gradient_ranks, weight_ranks = (data if zero_stage >= stage else 1 for stage in (1, 2, 3))
    masters = 0 if precision == "fp32" and zero_stage == 0 else 4
    return TrainingBytes(
        weights=width * count / weight_ranks,
        gradients=width * count / gradient_ranks,
        masters=masters * count / optimizer_ranks,
        moments=8 * count / optimizer_ranks,
    )


def time_left(*, tokens: int, total_tokens: int, tokens_per_s: float) -> float:
    """Seconds until `total_tokens`, of which `tokens` are done, at the present speed; infinite if nothing moves."""
    left = max(0, total_tokens - tokens)
    if left == 0:
        return 0.0
    return left / tokens_per_s if tokens_per_s > 0 else float("inf")
