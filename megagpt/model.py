"""The GPT, as a plain list of layers [Embedding, Block, ..., Block, Head]: no mesh, no DeepSpeed, no Triton.

x = embedding(tokens);  x += attention(norm(x));  x += feed_forward(norm(x));  logits = output(norm(x))
(Radford et al. 2019, "Language models are unsupervised multitask learners"; Brown et al. 2020, arXiv:2005.14165), with
the choices of `config.Model`. Every layer maps a `Carry` to a `Carry`; the head ends in logits or in the loss. All use
of a weight is inside the forward() of the module that owns it, since ZeRO-3 gathers weights by hooks on forward().

Letters: B batch, T tokens, S key tokens, D width, N query heads, G key and value heads, K head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megagpt import config
from megagpt.data.batch import Batch, document_starts
from megagpt.modules import (
    AddDropout,
    AddLayerNorm,
    AddRMSNorm,
    Dropout,
    GeluLinear,
    LayerNorm,
    Linear,
    RMSNorm,
    Table,
)
from megagpt.ops import Operators, select
from megagpt.philox import key_of

# x_BTD, document_start_BT (None: a row is one document), samples_B (the rows' numbers in the run's stream of samples).
Carry = tuple[Tensor, Tensor | None, Tensor]
Recompute = Literal["none", "selective", "full"]


class KeyValueCache:
    """One layer's keys and values of the tokens so far, in memory that is allocated once."""

    def __init__(self, model: config.Model, *, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (batch, model.context, model.key_value_heads(), model.head_width())
        self.k_BSGK = torch.empty(shape, dtype=dtype, device=device)
        self.v_BSGK = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Store T more tokens; the keys and values of all tokens so far. Raises ValueError past the context."""
        start, self.length = self.length, self.length + k_BTGK.shape[1]
        if self.length > self.k_BSGK.shape[1]:
            raise ValueError(f"{self.length:,} tokens are more than the cache's {self.k_BSGK.shape[1]:,}")
        self.k_BSGK[:, start : self.length] = k_BTGK
        self.v_BSGK[:, start : self.length] = v_BTGK
        return self.k_BSGK[:, : self.length], self.v_BSGK[:, : self.length]


def _norm(model: config.Model, ops: Operators) -> nn.Module:
    kind = LayerNorm if model.norm == "layernorm" else RMSNorm
    return kind(model.width, eps=model.norm_eps, ops=ops)


class Embedding(nn.Module):
    """Tokens to features, with a learned feature vector a position, counted from the document's start."""

    def __init__(self, model: config.Model, *, seed: int, vocabulary_rows: int, ops: Operators) -> None:
        super().__init__()
        self.token = Table(vocabulary_rows, model.width)
        self.position = Table(model.context, model.width) if model.positions == "learned" else None
        self.dropout = Dropout(model.dropout, "embedding", seed=seed, ops=ops)

    def forward(self, carry: Carry, first_position: int = 0) -> Carry:
        """`carry` holds tokens_BT in the place of x_BTD; their places in the row count from `first_position`."""
        tokens_BT, document_start_BT, samples_B = carry
        x_BTD = self.token(tokens_BT)
        if self.position is not None:
            place = torch.arange(first_position, first_position + tokens_BT.shape[1], device=tokens_BT.device)
            if document_start_BT is not None:
                place = place - document_start_BT
            x_BTD = x_BTD + self.position(place)
        return self.dropout(x_BTD, samples_B), document_start_BT, samples_B


class Attention(nn.Module):
    """Self-attention: one matrix for queries, keys and values (rows q | k | v), one for the output."""

    def __init__(self, model: config.Model, *, layer: int, seed: int, ops: Operators) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = model.heads, model.key_value_heads(), model.head_width()
        self.window = model.layer_window(layer)
        self.rotary_base = model.rotary_base if model.positions == "rotary" else None
        self.ops = ops
        rows = (self.heads + 2 * self.kv_heads) * self.head_width
        self.query_key_value = Linear(model.width, rows, bias=model.biases == "all")
        self.query_norm = RMSNorm(self.head_width, eps=model.norm_eps, ops=ops) if model.qk_norm else None
        self.key_norm = RMSNorm(self.head_width, eps=model.norm_eps, ops=ops) if model.qk_norm else None
        self.dropout = Dropout(model.dropout, f"blocks.{layer}.attention", seed=seed, ops=ops)
        self.output = Linear(self.heads * self.head_width, model.width, bias=model.biases != "none")

    def forward(
        self, x_BTD: Tensor, document_start_BT: Tensor | None, samples_B: Tensor, cache: KeyValueCache | None = None
    ) -> Tensor:
        qkv = self.query_key_value(x_BTD).unflatten(-1, (-1, self.head_width))
        q_BTNK, k_BTGK, v_BTGK = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        if self.query_norm is not None and self.key_norm is not None:
            q_BTNK, k_BTGK = self.query_norm(q_BTNK), self.key_norm(k_BTGK)
        if (
            self.rotary_base is not None
        ):  # places in the row: attention stays in a document, where only their gaps count
            first = 0 if cache is None else cache.length
            place = torch.arange(first, first + qkv.shape[1], device=x_BTD.device)
            q_BTNK, k_BTGK = self.ops.rotary(q_BTNK, k_BTGK, place, self.rotary_base)
        if cache is not None:
            k_BTGK, v_BTGK = cache.append(k_BTGK, v_BTGK)
        o_BTNK = self.ops.attention(
            q_BTNK,
            k_BTGK,
            v_BTGK,
            window=self.window,
            document_start_BT=document_start_BT,
            dropout=self.dropout.mask(samples_B),
        )
        return self.output(o_BTNK.flatten(2))


class GeluFeedForward(nn.Module):
    """down(up(x)), where up ends in the GELU."""

    def __init__(self, model: config.Model, *, ops: Operators) -> None:
        super().__init__()
        bias = model.biases != "none"
        self.up = GeluLinear(model.width, model.feed_forward_width(), bias=bias, ops=ops)
        self.down = Linear(model.feed_forward_width(), model.width, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(self.up(x_BTD))


class SwigluFeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one matrix (rows gate | up)."""

    def __init__(self, model: config.Model, *, ops: Operators) -> None:
        super().__init__()
        bias = model.biases != "none"
        self.gate_up = Linear(model.width, 2 * model.feed_forward_width(), bias=bias)
        self.down = Linear(model.feed_forward_width(), model.width, bias=bias)
        self.ops = ops

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(self.ops.swiglu(self.gate_up(x_BTD)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    The addition after attention is part of the norm that follows it; the one after feed_forward is not part of the
    next block's, since x alone is what layers, and pipeline stages, hand on. Recomputation needs no generator's
    state, since dropout has none.
    """

    def __init__(self, model: config.Model, *, layer: int, seed: int, recompute: Recompute, ops: Operators) -> None:
        super().__init__()
        self.attention_norm = _norm(model, ops)
        self.attention = Attention(model, layer=layer, seed=seed, ops=ops)
        self.attention_dropout = Dropout(model.dropout, f"blocks.{layer}.attention.residual", seed=seed, ops=ops)
        add_norm = AddLayerNorm if model.norm == "layernorm" else AddRMSNorm
        self.feed_forward_norm = add_norm(model.width, eps=model.norm_eps, ops=ops)
        feed_forward = GeluFeedForward if model.feed_forward == "gelu" else SwigluFeedForward
        self.feed_forward = feed_forward(model, ops=ops)
        self.feed_forward_dropout = AddDropout(
            model.dropout, f"blocks.{layer}.feed_forward.residual", seed=seed, ops=ops
        )
        self.recompute = recompute

    def forward(self, carry: Carry, cache: KeyValueCache | None = None) -> Carry:
        if self.recompute == "full":
            return _recomputed(self._whole, carry, cache)
        return self._whole(carry, cache)

    def _whole(self, carry: Carry, cache: KeyValueCache | None) -> Carry:
        x_BTD, document_start_BT, samples_B = carry
        branch_BTD = self.attention(self.attention_norm(x_BTD), document_start_BT, samples_B, cache)
        if self.recompute == "selective":
            x_BTD = _recomputed(self._second_half, branch_BTD, x_BTD, samples_B)
        else:
            x_BTD = self._second_half(branch_BTD, x_BTD, samples_B)
        return x_BTD, document_start_BT, samples_B

    def _second_half(self, branch_BTD: Tensor, x_BTD: Tensor, samples_B: Tensor) -> Tensor:
        mask = self.attention_dropout.mask(samples_B)
        y_BTD, x_BTD = self.feed_forward_norm(branch_BTD, x_BTD, mask)
        return self.feed_forward_dropout(self.feed_forward(y_BTD), x_BTD, samples_B)


def _recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
    """function(*inputs), of which the backward keeps the inputs alone and computes the rest again."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Head(nn.Module):
    """Features to logits, or to the loss."""

    def __init__(
        self, model: config.Model, *, vocabulary_rows: int, tied: nn.Parameter | None, ops: Operators
    ) -> None:
        """`tied` is the embedding's own parameter where the two share it, so that ZeRO-3 gathers it for both."""
        super().__init__()
        self.norm = _norm(model, ops)
        self.output = Linear(model.width, vocabulary_rows, bias=False, weight=tied)
        self.vocabulary, self.ops = model.vocabulary, ops

    def forward(self, carry: Carry, targets_BT: Tensor | None = None) -> Tensor:
        """logits_BTV without the padded columns, or with targets the sum (fp32) of the losses that are not masked."""
        logits_BTV = self.output(self.norm(carry[0]))
        if targets_BT is None:
            return logits_BTV[..., : self.vocabulary]
        return self.ops.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), vocabulary=self.vocabulary).sum()


def layers(model: config.Model, *, seed: int, recompute: Recompute, vocabulary_rows: int) -> list[nn.Module]:
    """The model's layers, without values: [Embedding, *Blocks, Head].

    `seed` keys the dropout masks; `vocabulary_rows` is the vocabulary with its padding. Raises UserError if the
    operators that model.kernels asks for do not exist, ValueError if there are fewer rows than tokens.
    """
    if vocabulary_rows < model.vocabulary:
        raise ValueError(f"{vocabulary_rows:,} rows cannot hold a vocabulary of {model.vocabulary:,}")
    ops = select(model.kernels)
    embedding = Embedding(model, seed=seed, vocabulary_rows=vocabulary_rows, ops=ops)
    blocks = [Block(model, layer=layer, seed=seed, recompute=recompute, ops=ops) for layer in range(model.layers)]
    tied = embedding.token.weight if model.tied else None
    return [embedding, *blocks, Head(model, vocabulary_rows=vocabulary_rows, tied=tied, ops=ops)]


class GPT(nn.Module):
    """The layers as one module, whose parameter names are the global names of the whole model."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        """`parts` is what `layers` returns."""
        super().__init__()
        embedding, *blocks, head = parts
        assert isinstance(embedding, Embedding)
        assert isinstance(head, Head)
        self.embedding, self.blocks, self.head = embedding, nn.ModuleList(blocks), head

    def forward(self, batch: Batch) -> Tensor:
        """The sum (fp32) of the losses of the batch's targets that are not masked."""
        start_BT = None
        if batch.cu_seqlens_S is not None:
            start_BT = document_starts(batch.cu_seqlens_S, *batch.tokens_BT.shape)
        carry = self.embedding((batch.tokens_BT, start_BT, batch.samples_B))
        for block in self.blocks:
            carry = block(carry)
        return self.head(carry, batch.targets_BT)

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """logits_BTV of rows that are one document each."""
        carry = self.embedding((tokens_BT, None, tokens_BT.new_zeros(len(tokens_BT))))
        for block in self.blocks:
            carry = block(carry)
        return self.head(carry)

    def next_logits(self, tokens_BT: Tensor, caches: Sequence[KeyValueCache]) -> Tensor:
        """logits_BV after the last of T more tokens, which go on where the caches, one a block, end."""
        carry = self.embedding((tokens_BT, None, tokens_BT.new_zeros(len(tokens_BT))), caches[0].length)
        for block, cache in zip(self.blocks, caches, strict=True):
            carry = block(carry, cache)
        x_BTD, document_start_BT, samples_B = carry
        return self.head((x_BTD[:, -1:], document_start_BT, samples_B))[:, 0]


def initial_value(name: str, shape: Sequence[int], model: config.Model, *, seed: int) -> Tensor:
    """fp32: the initial value of the parameter with this global name, the same on every layout.

    Norm weights are 1, biases 0. Matrices are normal with deviation init_std, over sqrt(2 L) where they write to the
    residual stream (Radford et al. 2019, section 2.3), drawn by torch's CPU generator seeded with
    key_of(seed, "weights", name). Rows of padding are 0, so that the others do not depend on how many there are.
    """
    if name.endswith("norm.weight"):
        return torch.ones(*shape)
    value = torch.zeros(*shape)
    if name.endswith(".bias"):
        return value
    std = model.init_std
    if name.endswith(("attention.output.weight", "feed_forward.down.weight")):
        std /= (2 * model.layers) ** 0.5
    drawn = value[: model.vocabulary] if name in ("embedding.token.weight", "head.output.weight") else value
    drawn.normal_(0, std, generator=torch.Generator().manual_seed(key_of(seed, "weights", name)))
    return value


@torch.no_grad()
def initialise(gpt: GPT, model: config.Model, *, seed: int) -> None:
    """Give every parameter of a whole model its initial value."""
    for name, parameter in gpt.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, model, seed=seed))


def build(model: config.Model, *, seed: int = 0, recompute: Recompute = "none") -> GPT:
    """The whole model on one rank, without values; `seed` keys the dropout masks."""
    return GPT(layers(model, seed=seed, recompute=recompute, vocabulary_rows=model.vocabulary))
