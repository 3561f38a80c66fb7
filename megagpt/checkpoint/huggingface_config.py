"""`config.Model` as Hugging Face's config.json and back, for the four layouts that have an equal of our model.

| layout   | our settings                                                                                |
|----------|---------------------------------------------------------------------------------------------|
| gpt2     | learned positions, layernorm, gelu, as many kv_heads as heads, every layer dense              |
| gpt_neo  | the same with a window in every second layer, and no bias on queries, keys and values         |
| llama    | rotary positions, rmsnorm, swiglu, no biases, every layer dense                               |
| qwen3    | the same with qk_norm; the window of every second layer is allowed                            |

What has no equal is refused with the setting and the reason, in both directions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megagpt.config import Model
from megagpt.errors import UserError


@dataclass(frozen=True)
class _Kind:
    """How one layout's settings are written and read."""

    architecture: str
    write: Callable[[Model], dict[str, Any]]
    read: Callable[[dict[str, Any]], Model]


def model_type(model: Model) -> str:
    """Which of the layouts the model is exported in. Raises UserError if none has an equal of it."""
    banded = any(model.layer_window(layer) is not None for layer in range(model.layers))
    if model.positions == "learned":
        kind = "gpt_neo" if banded else "gpt2"
        wanted = {"norm": "layernorm", "feed_forward": "gelu", "qk_norm": False}
        if model.key_value_heads() != model.heads:
            raise _no_equal("kv_heads", model.kv_heads, "learned positions come with as many kv_heads as heads")
        if kind == "gpt_neo" and model.biases == "all":
            raise _no_equal(
                "biases", "all", "GPT-Neo, the layout with windows, has no bias on queries, keys and values"
            )
    else:
        kind = "qwen3" if model.qk_norm else "llama"
        wanted = {"norm": "rmsnorm", "feed_forward": "swiglu", "biases": "none"}
        if kind == "llama" and banded:
            raise _no_equal("window", model.window, "Llama has no windows; Qwen3 has, with model.qk_norm")
    for name, value in wanted.items():
        if getattr(model, name) != value:
            reason = f"{model.positions} positions come with {name} {value} in every layout that is written"
            raise _no_equal(name, getattr(model, name), reason)
    return kind


def _no_equal(name: str, value: object, reason: str) -> UserError:
    return UserError(
        f"model.{name} = {value} has no equal in Hugging Face's layouts: {reason}.",
        "The run's own checkpoints keep it; docs/model.md lists what can be exported.",
    )


def write_config(model: Model, *, end_of_text: int, dtype: str) -> dict[str, Any]:
    """The config.json of `model`; `dtype` names the weights' type as torch does. Raises UserError like model_type."""
    kind = model_type(model)
    return {
        "architectures": [_KINDS[kind].architecture],
        "model_type": kind,
        "vocab_size": model.vocabulary,
        "tie_word_embeddings": model.tied,
        "initializer_range": model.init_std,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": dtype,
        **_KINDS[kind].write(model),
    }


def read_config(settings: dict[str, Any], *, source: str) -> Model:
    """The model of a config.json. Raises UserError if it is another layout, or a setting has no equal here."""
    kind = _KINDS.get(settings.get("model_type", ""))
    if kind is None:
        raise UserError(
            f"{source}: model_type = {settings.get('model_type')!r} is not one of {', '.join(_KINDS)}.",
            "Other layouts cannot be imported.",
        )
    try:
        return kind.read(settings)
    except KeyError as error:
        raise UserError(f"{source} has no {error.args[0]}.") from error
    except ValueError as error:
        raise UserError(f"{source}: {error}.") from error


def _require(settings: dict[str, Any], name: str, *allowed: object) -> None:
    """ValueError unless the setting is absent, its default then being the first allowed value, or allowed."""
    value = settings.get(name, allowed[0])
    if value not in allowed:
        raise ValueError(f"{name} = {value!r} has no equal in megagpt, where it is {allowed[0]!r}")


def _write_gpt2(model: Model) -> dict[str, Any]:
    return {
        "n_layer": model.layers,
        "n_embd": model.width,
        "n_head": model.heads,
        "n_inner": model.feed_forward_width(),
        "n_positions": model.context,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": model.norm_eps,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), model.dropout),
    }


def _read_gpt2(settings: dict[str, Any]) -> Model:
    _require(settings, "activation_function", "gelu_new", "gelu_pytorch_tanh")
    _require(settings, "scale_attn_weights", True)
    _require(settings, "scale_attn_by_inverse_layer_idx", False)
    _require(settings, "add_cross_attention", False)
    return Model(
        layers=settings["n_layer"],
        width=settings["n_embd"],
        heads=settings["n_head"],
        hidden=settings.get("n_inner"),
        vocabulary=settings["vocab_size"],
        context=settings["n_positions"],
        norm_eps=settings["layer_norm_epsilon"],
        tied=settings.get("tie_word_embeddings", True),
        dropout=float(settings.get("resid_pdrop", 0.1)),
        init_std=settings.get("initializer_range", 0.02),
    )


def _write_gpt_neo(model: Model) -> dict[str, Any]:
    pairs = [[["global", "local"], model.layers // 2]] if model.layers > 1 else []
    return {
        "num_layers": model.layers,
        "hidden_size": model.width,
        "num_heads": model.heads,
        "intermediate_size": model.feed_forward_width(),
        "max_position_embeddings": model.context,
        "window_size": model.window,
        "attention_types": pairs + ([[["global"], 1]] if model.layers % 2 else []),
        "activation_function": "gelu_new",
        "layer_norm_epsilon": model.norm_eps,
        **dict.fromkeys(("embed_dropout", "attention_dropout", "resid_dropout"), model.dropout),
    }


def _read_gpt_neo(settings: dict[str, Any]) -> Model:
    _require(settings, "activation_function", "gelu_new", "gelu_pytorch_tanh")
    kinds = [kind for pattern, times in settings["attention_types"] for _ in range(times) for kind in pattern]
    if len(kinds) != settings["num_layers"]:
        raise ValueError(f"attention_types has {len(kinds)} layers, but num_layers is {settings['num_layers']}")
    return Model(
        layers=settings["num_layers"],
        width=settings["hidden_size"],
        heads=settings["num_heads"],
        hidden=settings.get("intermediate_size"),
        vocabulary=settings["vocab_size"],
        context=settings["max_position_embeddings"],
        window=_window(kinds, dense="global", size=settings["window_size"], name="attention_types"),
        norm_eps=settings["layer_norm_epsilon"],
        biases="no_qkv",
        tied=settings.get("tie_word_embeddings", True),
        dropout=float(settings.get("resid_dropout", 0.0)),
        init_std=settings.get("initializer_range", 0.02),
    )


def _window(kinds: list[str], *, dense: str, size: int, name: str) -> int | None:
    """Our window for a list of layer kinds. ValueError unless all are dense or every second one is banded."""
    banded = [kind != dense for kind in kinds]
    if not any(banded):
        return None
    if banded != [layer % 2 == 1 for layer in range(len(kinds))]:
        raise ValueError(
            f"{name} = {kinds} has no equal in megagpt, where the second, fourth, ... layers have windows"
        )
    return size


def _write_llama(model: Model) -> dict[str, Any]:
    return {
        "num_hidden_layers": model.layers,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.key_value_heads(),
        "head_dim": model.head_width(),
        "intermediate_size": model.feed_forward_width(),
        "max_position_embeddings": model.context,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rotary_base,
        "attention_bias": False,
    }


def _read_llama(settings: dict[str, Any]) -> Model:
    _require(settings, "hidden_act", "silu")
    _require(settings, "attention_bias", False)
    _require(settings, "mlp_bias", False)
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}  # the first since transformers 5
    _require(rope, "rope_type", "default")
    _require(rope, "type", "default")
    heads = settings["num_attention_heads"]
    _require(settings, "head_dim", settings["hidden_size"] // heads, None)
    return Model(
        layers=settings["num_hidden_layers"],
        width=settings["hidden_size"],
        heads=heads,
        kv_heads=settings.get("num_key_value_heads"),
        hidden=settings["intermediate_size"],
        vocabulary=settings["vocab_size"],
        context=settings["max_position_embeddings"],
        norm="rmsnorm",
        norm_eps=settings["rms_norm_eps"],
        positions="rotary",
        rotary_base=float(rope.get("rope_theta", settings.get("rope_theta", 10_000.0))),
        feed_forward="swiglu",
        biases="none",
        tied=settings.get("tie_word_embeddings", False),
        init_std=settings.get("initializer_range", 0.02),
    )


def _write_qwen3(model: Model) -> dict[str, Any]:
    written = _write_llama(model)
    if model.window is not None:
        kinds = [
            "full_attention" if model.layer_window(i) is None else "sliding_attention" for i in range(model.layers)
        ]
        written |= {"use_sliding_window": True, "sliding_window": model.window, "layer_types": kinds}
    return written


def _read_qwen3(settings: dict[str, Any]) -> Model:
    window = None
    if settings.get("use_sliding_window", False):
        size = settings["sliding_window"]
        window = _window(settings["layer_types"], dense="full_attention", size=size, name="layer_types")
    if "head_dim" not in settings:
        raise ValueError(
            "head_dim is missing, and Qwen3's default of 128 may not be hidden_size / num_attention_heads"
        )
    return dataclasses.replace(_read_llama(settings), qk_norm=True, window=window)


_KINDS = {
    "gpt2": _Kind("GPT2LMHeadModel", _write_gpt2, _read_gpt2),
    "gpt_neo": _Kind("GPTNeoForCausalLM", _write_gpt_neo, _read_gpt_neo),
    "llama": _Kind("LlamaForCausalLM", _write_llama, _read_llama),
    "qwen3": _Kind("Qwen3ForCausalLM", _write_qwen3, _read_qwen3),
}
