"""Folders against the transformers library itself: logits and every gradient, in both directions."""

import dataclasses
import json
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from megagpt.checkpoint.huggingface import export, import_folder
from megagpt.checkpoint.huggingface_names import entries
from megagpt.config import Model
from megagpt.data.tokenizer import train_tokenizer
from megagpt.errors import UserError
from megagpt.model import GPT, build, initialise

torch.set_num_threads(1)

GPT2 = Model(layers=3, width=32, heads=4, hidden=72, vocabulary=300, context=24, init_std=0.2)
GPT_NEO = dataclasses.replace(GPT2, window=5, biases="no_qkv")
LLAMA = Model(
    layers=3,
    width=32,
    heads=4,
    kv_heads=2,
    hidden=40,
    vocabulary=300,
    context=24,
    norm="rmsnorm",
    positions="rotary",
    rotary_base=500.0,
    feed_forward="swiglu",
    biases="none",
    tied=False,
    init_std=0.2,
)
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True)
MODELS = {
    "gpt2": GPT2,
    "gpt2-without-qkv-biases": dataclasses.replace(GPT2, biases="no_qkv"),
    "gpt2-without-biases": dataclasses.replace(GPT2, biases="none"),
    "gpt2-untied": dataclasses.replace(GPT2, tied=False),
    "gpt_neo": GPT_NEO,
    "gpt_neo-without-biases": dataclasses.replace(GPT_NEO, biases="none", layers=2),
    "llama": LLAMA,
    "llama-tied": dataclasses.replace(LLAMA, tied=True),
    "qwen3": QWEN3,
    "qwen3-banded-tied": dataclasses.replace(QWEN3, tied=True, window=5),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 9, 290).definition)
    return path


def random_model(model):
    gpt = build(model)
    initialise(gpt, model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in gpt.parameters():
            if parameter.ndim == 1:  # norms and biases away from 1 and 0
                parameter += torch.randn(parameter.shape, generator=generator) * 0.3
    return gpt


def export_to(folder, gpt, model, tokenizer, **options):
    export(dict(gpt.named_parameters()), model, tokenizer, folder, **options)
    return folder


def load_ours(folder):
    model, parameters = import_folder(folder)
    gpt = build(model)
    gpt.load_state_dict(dict(parameters), strict=not model.tied)
    return model, gpt


def logits_and_gradients(module, logits):
    targets = torch.arange(logits.shape[0] * logits.shape[1]) * 7 % logits.shape[2]
    loss = F.cross_entropy(logits.flatten(0, 1), targets)
    names, parameters = zip(*module.named_parameters(), strict=True)
    return logits, dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_equal_within_rounding(ours, theirs, what):
    """Elements differ by at most 1e-5 of the largest: some hundred roundings in fp32."""
    difference = (ours - theirs).abs().max() / theirs.abs().max()
    assert difference < 1e-5, f"{what}: {difference}"


def assert_the_same_function(gpt: GPT, model, theirs):
    tokens = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(3))
    logits, gradients = logits_and_gradients(gpt, gpt.logits(tokens))
    their_logits, their_gradients = logits_and_gradients(theirs, theirs(tokens, use_cache=False).logits)
    assert_equal_within_rounding(logits, their_logits, "logits")
    for entry in entries(theirs.config.model_type, model):
        if entry.ours in gradients:  # not a bias that only they have
            back = dataclasses.replace(entry, query_factor=1 / entry.query_factor)  # a gradient scales the other way
            wanted = back.joined([their_gradients.pop(name) for name in entry.theirs])
            assert_equal_within_rounding(gradients.pop(entry.ours), wanted, entry.ours)
    assert not gradients
    assert all(name.endswith("bias") for name in their_gradients)


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_model_has_the_same_logits_and_gradients_there(name, tmp_path, tokenizer):
    from transformers import AutoModelForCausalLM

    model = MODELS[name]
    gpt = random_model(model)
    folder = export_to(tmp_path / "model", gpt, model, tokenizer)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    theirs, report = loaded
    assert theirs.config.model_type == name.split("-")[0]
    assert not any(report.values()), report
    assert_the_same_function(gpt, model, theirs.float())


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_from_its_export(name, tmp_path, tokenizer):
    model = MODELS[name]
    gpt = random_model(model)
    again, parameters = import_folder(export_to(tmp_path / "model", gpt, model, tokenizer))
    layout_has = {"gpt2": "all", "gpt_neo": "no_qkv"}.get(name.split("-")[0], "none")
    assert again == dataclasses.replace(model, biases=layout_has, kv_heads=again.kv_heads)
    assert again.key_value_heads() == model.key_value_heads()
    ours = dict(gpt.named_parameters())
    for parameter, value in parameters:
        wanted = ours.pop(parameter, torch.zeros(()))  # a bias that only the layout has is 0
        torch.testing.assert_close(value, wanted.expand_as(value), rtol=1e-6, atol=0)
    assert not ours


COMMON = {"vocab_size": 300, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0}
WIDE = COMMON | {"hidden_size": 32, "max_position_embeddings": 24}
GROUPED = WIDE | {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40}
THEIR_SETTINGS = {
    "gpt2": COMMON
    | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 24}
    | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neo": WIDE
    | {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 5},
    "llama": GROUPED,
    "qwen3": GROUPED | {"head_dim": 8, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("kind", THEIR_SETTINGS)
@pytest.mark.parametrize("base_only", [False, True], ids=["whole", "without-prefix"])
def test_an_imported_model_has_the_same_logits_and_gradients_here(kind, base_only, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(4)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **THEIR_SETTINGS[kind]))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter += torch.randn_like(parameter) * 0.3
    theirs.save_pretrained(tmp_path)
    if base_only:
        path = tmp_path / "model.safetensors"
        stored = load_file(path)
        save_file({re.sub(r"^(transformer|model)\.", "", name): tensor for name, tensor in stored.items()}, path)
    model, gpt = load_ours(tmp_path)
    assert_the_same_function(gpt, model, theirs)


def test_the_exported_tokenizer_encodes_as_ours(tmp_path, tokenizer):
    from transformers import AutoTokenizer

    from megagpt.data.tokenizer import load_tokenizer

    folder = export_to(tmp_path / "model", random_model(GPT2), GPT2, tokenizer)
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(tokenizer)
    assert theirs("the lazy quick fox, élan")["input_ids"] == ours.encode("the lazy quick fox, élan")
    assert theirs.eos_token_id == ours.end_of_text
    assert theirs.model_max_length == 24


def test_weights_over_the_size_of_a_file_are_cut_into_several(tmp_path, tokenizer):
    from transformers import AutoModelForCausalLM

    gpt = random_model(GPT2)
    folder = export_to(tmp_path / "model", gpt, GPT2, tokenizer, file_bytes=30_000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    assert_the_same_function(gpt, GPT2, AutoModelForCausalLM.from_pretrained(folder))
    assert_the_same_function(load_ours(folder)[1], GPT2, AutoModelForCausalLM.from_pretrained(folder))


def test_half_precision_and_padded_rows_are_exported_as_they_should(tmp_path, tokenizer):
    from transformers import AutoModelForCausalLM

    weights = {name: tensor.bfloat16() for name, tensor in random_model(LLAMA).named_parameters()}
    for name in ("embedding.token.weight", "head.output.weight"):
        weights[name] = torch.cat((weights[name], torch.zeros(20, 32, dtype=torch.bfloat16)))
    export(weights, LLAMA, tokenizer, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert theirs.dtype == torch.bfloat16
    assert theirs.lm_head.weight.shape == (300, 32)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (dataclasses.replace(GPT_NEO, biases="all"), "model.biases = all has no equal"),
        (dataclasses.replace(GPT2, kv_heads=2), "model.kv_heads = 2 has no equal"),
        (dataclasses.replace(GPT2, norm="rmsnorm"), "model.norm = rmsnorm has no equal"),
        (dataclasses.replace(GPT2, feed_forward="swiglu"), "model.feed_forward = swiglu has no equal"),
        (dataclasses.replace(GPT2, qk_norm=True), "model.qk_norm = True has no equal"),
        (dataclasses.replace(LLAMA, window=5), "model.window = 5 has no equal"),
        (dataclasses.replace(LLAMA, biases="all"), "model.biases = all has no equal"),
        (dataclasses.replace(LLAMA, norm="layernorm"), "model.norm = layernorm has no equal"),
    ],
)
def test_what_has_no_equal_there_is_refused_and_nothing_is_written(model, words, tmp_path, tokenizer):
    with pytest.raises(UserError) as caught:
        export_to(tmp_path / "model", random_model(model), model, tokenizer)
    assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(tmp_path, tokenizer):
    with pytest.raises(UserError, match="exists already"):
        export_to(tmp_path, random_model(GPT2), GPT2, tokenizer)


def test_an_export_that_fails_leaves_nothing(tmp_path, tokenizer):
    weights = dict(random_model(GPT2).named_parameters())
    del weights["blocks.2.feed_forward.down.weight"]
    with pytest.raises(KeyError):
        export(weights, GPT2, tokenizer, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def folder(tmp_path, tokenizer):
    return export_to(tmp_path / "model", random_model(LLAMA), LLAMA, tokenizer)


def change_settings(folder, **changes):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba"}, "model_type = 'mamba' is not one of gpt2, gpt_neo, llama, qwen3"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu' has no equal in megagpt"),
        ({"attention_bias": True}, "attention_bias = True has no equal"),
        ({"head_dim": 16}, "head_dim = 16 has no equal"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type = 'linear' has no equal"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type = 'llama3' has no equal"),
        ({"num_hidden_layers": 2}, "has a tensor model.layers.2."),
        ({"num_hidden_layers": 4}, "has no tensor model.layers.3.input_layernorm.weight (9 of 39 are missing)"),
    ],
)
def test_a_folder_that_has_no_equal_here_is_refused_by_name(folder, changes, words):
    change_settings(folder, **changes)
    with pytest.raises(UserError) as caught:
        import_folder(folder)
    assert words in str(caught.value)


def test_a_tensor_of_another_shape_is_refused_by_name(folder):
    change_settings(folder, intermediate_size=44)
    _, parameters = import_folder(folder)
    with pytest.raises(UserError, match=r"gate_proj.weight \+ .*up_proj.weight has the shape \(80, 32\)"):
        dict(parameters)


def test_a_folder_without_config_weights_or_json_is_refused(folder):
    (folder / "model.safetensors").write_bytes(b"\x09\0\0\0\0\0\0\0notheader")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        import_folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pickled"):
        import_folder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        import_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        import_folder(folder)


def test_windows_that_do_not_alternate_are_refused(tmp_path, tokenizer):
    folder = export_to(tmp_path / "model", random_model(GPT_NEO), GPT_NEO, tokenizer)
    change_settings(folder, attention_types=[[["local", "global"], 1], [["local"], 1]])
    with pytest.raises(UserError, match="attention_types"):
        import_folder(folder)
