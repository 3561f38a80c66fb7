"""Our parameters as Hugging Face's tensors and back: names, cuts and orientation, by one table a layout.

Ours hold queries, keys and values in one matrix (rows q | k | v), and swiglu's gate and up in one (rows gate | up);
there they are apart, except for GPT-2's `c_attn`. GPT-2 stores its matrices as [inputs, outputs]. GPT-Neo does not
divide the scores by sqrt(K), so that the division moves into its query rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megagpt.config import Model

_GPT2_BLOCK = {
    "attention_norm": ("ln_1",),
    "attention.query_key_value": ("attn.c_attn",),
    "attention.output": ("attn.c_proj",),
    "feed_forward_norm": ("ln_2",),
    "feed_forward.up": ("mlp.c_fc",),
    "feed_forward.down": ("mlp.c_proj",),
}
_GPT_NEO_BLOCK = _GPT2_BLOCK | {
    "attention.query_key_value": ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
    "attention.output": ("attn.attention.out_proj",),
}
_LLAMA_BLOCK = {
    "attention_norm": ("input_layernorm",),
    "attention.query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.output": ("self_attn.o_proj",),
    "feed_forward_norm": ("post_attention_layernorm",),
    "feed_forward.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "feed_forward.down": ("mlp.down_proj",),
}
_QWEN3_BLOCK = _LLAMA_BLOCK | {
    "attention.query_norm": ("self_attn.q_norm",),
    "attention.key_norm": ("self_attn.k_norm",),
}
_GPT2_ENDS = {"embedding.token": "wte", "embedding.position": "wpe", "head.norm": "ln_f"}
_LLAMA_ENDS = {"embedding.token": "embed_tokens", "head.norm": "norm"}
_GPT_NEO_BIASED = frozenset(_GPT2_BLOCK) - {"attention.query_key_value"} | {"head.norm"}


@dataclass(frozen=True)
class _Layout:
    prefix: str
    """Before every name but the head's."""
    blocks: str
    """Their list of blocks."""
    block: Mapping[str, tuple[str, ...]]
    """Our modules inside a block; where several of theirs stand, they share our rows."""
    ends: Mapping[str, str]
    """Our modules outside the blocks."""
    biased: frozenset[str] = frozenset()
    """Our modules that have a bias there."""
    transposed: frozenset[str] = frozenset()
    """Our modules whose matrix is [inputs, outputs] there."""


_LAYOUTS = {
    "gpt2": _Layout(
        prefix="transformer.",
        blocks="h",
        block=_GPT2_BLOCK,
        ends=_GPT2_ENDS,
        biased=_GPT_NEO_BIASED | {"attention.query_key_value"},
        transposed=frozenset(name for name in _GPT2_BLOCK if "norm" not in name),
    ),
    "gpt_neo": _Layout("transformer.", "h", _GPT_NEO_BLOCK, _GPT2_ENDS, biased=_GPT_NEO_BIASED),
    "llama": _Layout("model.", "layers", _LLAMA_BLOCK, _LLAMA_ENDS),
    "qwen3": _Layout("model.", "layers", _QWEN3_BLOCK, _LLAMA_ENDS),
}


@dataclass(frozen=True)
class Entry:
    """One of our parameters and what it is there."""

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...]
    """Of our rows, how many each of theirs has; of one alone, all."""
    transposed: bool = False
    query_factor: float = 1.0
    """What the rows of queries are multiplied by there."""

    def cut(self, ours: Tensor) -> list[Tensor]:
        """Their tensors of our parameter."""
        if self.transposed:
            return [ours.T]
        if len(self.theirs) == 1:
            return [ours]
        first, *others = ours.split(self.rows)
        return [first * self.query_factor if self.query_factor != 1 else first, *others]

    def joined(self, theirs: Sequence[Tensor]) -> Tensor:
        """Our parameter of their tensors."""
        if self.transposed:
            return theirs[0].T
        if len(self.theirs) == 1:
            return theirs[0]
        first, *others = theirs
        return torch.cat((first / self.query_factor if self.query_factor != 1 else first, *others))


def entries(kind: str, model: Model) -> Iterator[Entry]:
    """Every parameter that a folder of this model_type holds, the embedding first; a tied head is left out."""
    layout = _LAYOUTS[kind]
    factor = model.head_width() ** -0.5 if kind == "gpt_neo" else 1.0
    query, key_value = model.heads * model.head_width(), model.key_value_heads() * model.head_width()
    hidden = model.feed_forward_width()

    def parameters(module: str, prefix: str, names: tuple[str, ...], where: str) -> Iterator[Entry]:
        rows = {1: (), 2: (hidden, hidden), 3: (query, key_value, key_value)}[len(names)]
        for part in ("weight", "bias") if module in layout.biased else ("weight",):
            yield Entry(
                ours=f"{prefix}{module}.{part}",
                theirs=tuple(f"{where}{name}.{part}" for name in names),
                rows=rows,
                transposed=part == "weight" and module in layout.transposed,
                query_factor=factor if len(names) == 3 else 1.0,
            )

    for module, name in layout.ends.items():
        yield from parameters(module, "", (name,), layout.prefix)
    for layer in range(model.layers):
        for module, names in layout.block.items():
            yield from parameters(module, f"blocks.{layer}.", names, f"{layout.prefix}{layout.blocks}.{layer}.")
    if not model.tied:
        yield Entry("head.output.weight", ("lm_head.weight",), ())


def is_ballast(kind: str, name: str, model: Model) -> bool:
    """Whether a published tensor holds no parameter: an old attention mask, a RoPE table, a tied head's copy."""
    masks = (".attn.bias", ".attn.masked_bias", ".attn.attention.bias", ".attn.attention.masked_bias")
    if kind in ("gpt2", "gpt_neo"):
        return name.endswith(masks) or (model.tied and name == "lm_head.weight")
    return name.endswith("rotary_emb.inv_freq") or (model.tied and name == "lm_head.weight")
