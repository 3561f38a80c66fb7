"""The model: names, initial values, and that nothing depends on how sequences are batched, padded or recomputed."""

import dataclasses
import math

import pytest
import torch

from megagpt.config import Model
from megagpt.data.batch import IGNORE, Batch
from megagpt.model import GPT, Recompute, initial_value, initialise, layers
from megagpt.modules import Dropout

torch.set_num_threads(1)

GPT3 = Model(layers=2, width=24, heads=3, vocabulary=61, context=16, window=4, biases="no_qkv")
MODERN = Model(
    layers=2,
    width=24,
    heads=6,
    kv_heads=2,
    vocabulary=61,
    context=16,
    norm="rmsnorm",
    positions="rotary",
    feed_forward="swiglu",
    biases="none",
    qk_norm=True,
    tied=False,
)
BOTH = pytest.mark.parametrize("model", [GPT3, MODERN], ids=["gpt3", "modern"])


def build(model, *, seed=1, recompute: Recompute = "none", rows=None):
    """An initialised fp64 model whose norms and biases are not at their trivial values."""
    gpt = GPT(layers(model, seed=seed, recompute=recompute, vocabulary_rows=rows or model.vocabulary))
    initialise(gpt, model, seed=seed)
    gpt.double()
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            if parameter.ndim == 1:
                parameter += initial_value(name, parameter.shape, model, seed=seed) + 0.3
    return gpt


def batch(model, *, rows=3, seed=0, boundaries=None):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.vocabulary, (rows, model.context + 1), generator=generator)
    ends = None if boundaries is None else torch.tensor(boundaries, dtype=torch.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:].contiguous(), ends, torch.arange(rows) + 10)


def row(whole, i):
    return Batch(whole.tokens_BT[i : i + 1], whole.targets_BT[i : i + 1], None, whole.samples_B[i : i + 1])


def gradients(gpt, loss):
    names, parameters = zip(*gpt.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_parameters_have_the_global_names_of_gpt3():
    gpt = build(Model(layers=1, width=8, heads=2, vocabulary=11, context=4))
    assert {name: tuple(parameter.shape) for name, parameter in gpt.named_parameters()} == {
        "embedding.token.weight": (11, 8),
        "embedding.position.weight": (4, 8),
        "blocks.0.attention_norm.weight": (8,),
        "blocks.0.attention_norm.bias": (8,),
        "blocks.0.attention.query_key_value.weight": (24, 8),
        "blocks.0.attention.query_key_value.bias": (24,),
        "blocks.0.attention.output.weight": (8, 8),
        "blocks.0.attention.output.bias": (8,),
        "blocks.0.feed_forward_norm.weight": (8,),
        "blocks.0.feed_forward_norm.bias": (8,),
        "blocks.0.feed_forward.up.weight": (32, 8),
        "blocks.0.feed_forward.up.bias": (32,),
        "blocks.0.feed_forward.down.weight": (8, 32),
        "blocks.0.feed_forward.down.bias": (8,),
        "head.norm.weight": (8,),
        "head.norm.bias": (8,),
    }


def test_parameters_have_the_global_names_of_the_modern_model():
    gpt = build(dataclasses.replace(MODERN, layers=1, hidden=40))
    assert {name: tuple(parameter.shape) for name, parameter in gpt.named_parameters()} == {
        "embedding.token.weight": (61, 24),
        "blocks.0.attention_norm.weight": (24,),
        "blocks.0.attention.query_key_value.weight": (40, 24),
        "blocks.0.attention.query_norm.weight": (4,),
        "blocks.0.attention.key_norm.weight": (4,),
        "blocks.0.attention.output.weight": (24, 24),
        "blocks.0.feed_forward_norm.weight": (24,),
        "blocks.0.feed_forward.gate_up.weight": (80, 24),
        "blocks.0.feed_forward.down.weight": (24, 40),
        "head.norm.weight": (24,),
        "head.output.weight": (61, 24),
    }


def test_without_qkv_biases_the_other_linear_layers_keep_theirs():
    names = {name for name, _ in build(GPT3).named_parameters()}
    assert "blocks.1.attention.output.bias" in names
    assert "blocks.1.attention.query_key_value.bias" not in names


def test_a_tied_head_is_the_embeddings_own_parameter():
    gpt = build(GPT3)
    assert gpt.head.output.weight is gpt.embedding.token.weight
    untied = build(MODERN)
    assert not torch.equal(untied.head.output.weight, untied.embedding.token.weight)


def test_initial_values_are_those_of_gpt2():
    model = Model(layers=8, width=256, heads=4, vocabulary=512)
    draw = lambda name, *shape: initial_value(name, shape, model, seed=3)  # noqa: E731 - a shorthand
    assert draw("embedding.token.weight", 512, 256).std().item() == pytest.approx(0.02, rel=0.02)
    assert draw("blocks.2.attention.query_key_value.weight", 768, 256).std().item() == pytest.approx(0.02, rel=0.02)
    for name in ("blocks.2.attention.output.weight", "blocks.2.feed_forward.down.weight"):
        assert draw(name, 256, 256).std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.02)
    assert (draw("blocks.0.attention.query_norm.weight", 64) == 1).all()
    assert (draw("head.norm.bias", 64) == 0).all()
    assert draw("blocks.0.feed_forward.up.weight", 1024, 256).dtype == torch.float32


def test_an_initial_value_depends_on_seed_and_name_alone():
    name = "blocks.0.feed_forward.up.weight"
    one = initial_value(name, (96, 24), GPT3, seed=1)
    torch.manual_seed(77)
    assert torch.equal(one, initial_value(name, (96, 24), GPT3, seed=1))
    assert not torch.equal(one, initial_value(name, (96, 24), GPT3, seed=2))
    assert not torch.equal(one, initial_value(name.replace("0", "1"), (96, 24), GPT3, seed=1))


@BOTH
def test_rows_of_padding_change_neither_loss_nor_logits_nor_gradients(model):
    data, plain, padded = batch(model), build(model), build(model, rows=64)
    assert torch.equal(padded.embedding.token.weight[:61], plain.embedding.token.weight)
    torch.testing.assert_close(padded.logits(data.tokens_BT), plain.logits(data.tokens_BT))
    loss, same = plain(data), padded(data)
    torch.testing.assert_close(same, loss)
    wanted = gradients(plain, loss)
    for name, gradient in gradients(padded, same).items():
        torch.testing.assert_close(gradient[: len(wanted[name])], wanted[name])
        assert not gradient[len(wanted[name]) :].any()


def test_fewer_rows_than_tokens_are_refused():
    with pytest.raises(ValueError, match="60 rows cannot hold a vocabulary of 61"):
        layers(GPT3, seed=1, recompute="none", vocabulary_rows=60)


@BOTH
def test_the_loss_is_the_sum_over_the_targets_that_are_not_masked(model):
    gpt, data = build(model), batch(model)
    data.targets_BT[0, 3:] = IGNORE
    data.targets_BT[2] = IGNORE
    log_p = gpt.logits(data.tokens_BT).log_softmax(-1)
    wanted = -sum(
        log_p[b, t, data.targets_BT[b, t]] for b in range(3) for t in range(16) if data.targets_BT[b, t] != IGNORE
    )
    torch.testing.assert_close(gpt(data), wanted)


@pytest.mark.parametrize("changed", [0, 5, 15])
def test_a_token_reaches_later_positions_only_and_as_far_as_the_windows_say(changed):
    model = dataclasses.replace(GPT3, window=3)
    gpt, tokens = build(model), batch(model).tokens_BT[:1]
    other = tokens.clone()
    other[0, changed] = (other[0, changed] + 1) % 61
    x, y = (gpt.embedding((t, None, torch.zeros(1))) for t in (tokens, other))
    banded = [gpt.blocks[1](carry)[0] for carry in (x, y)]
    moved = (banded[0] != banded[1]).any(-1)[0].nonzero().flatten().tolist()
    assert moved == [i for i in range(changed, changed + 3) if i < 16]
    dense = [gpt.blocks[0](carry)[0] for carry in (x, y)]
    assert (dense[0] != dense[1]).any(-1)[0].nonzero().flatten().tolist() == list(range(changed, 16))


@BOTH
def test_documents_packed_into_a_row_give_the_loss_of_each_alone(model):
    gpt = build(model)
    packed = batch(model, rows=2, boundaries=[0, 5, 6, 16, 27, 32, 32, 32])
    alone = 0.0
    for start, end in ((0, 5), (5, 6), (6, 16), (16, 27), (27, 32)):
        tokens, targets = (t.flatten()[start:end][None] for t in (packed.tokens_BT, packed.targets_BT))
        alone = alone + gpt(Batch(tokens, targets, None, torch.zeros(1, dtype=torch.int64)))
    loss = gpt(packed)
    torch.testing.assert_close(loss, alone)
    wanted = gradients(gpt, alone)
    for name, gradient in gradients(gpt, loss).items():
        torch.testing.assert_close(gradient, wanted[name])


@BOTH
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit_of_loss_and_gradients_and_keeps_fewer_activations(model, recompute):
    model = dataclasses.replace(model, dropout=0.2)
    results, kept = {}, {}
    for choice in ("none", recompute):
        gpt, sizes = build(model, recompute=choice), []
        pack = lambda tensor, sizes=sizes: (sizes.append(tensor.numel()), tensor)[1]  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = gpt(batch(model))
        kept[choice] = sum(sizes)
        results[choice] = {"loss": loss, **gradients(gpt, loss)}
    assert kept[recompute] < 0.8 * kept["none"]
    for name, value in results["none"].items():
        assert torch.equal(results[recompute][name], value), name


@BOTH
def test_dropout_falls_on_the_same_elements_of_a_sample_in_any_batch(model):
    gpt = build(dataclasses.replace(model, dropout=0.3))
    data = batch(model)
    torch.testing.assert_close(gpt(data), sum(gpt(row(data, i)) for i in range(3)))
    renumbered = dataclasses.replace(data, samples_B=data.samples_B + 1)
    assert abs(gpt(renumbered) - gpt(data)) > 1e-3


def test_every_site_of_dropout_has_its_own_key_and_every_one_is_used():
    model = dataclasses.replace(GPT3, dropout=0.3)
    gpt = build(model)
    sites = [module for module in gpt.modules() if isinstance(module, Dropout)]
    assert len(sites) == len({site.key for site in sites}) == 1 + 3 * model.layers
    whole = gpt(batch(model))
    for site in sites:
        site.rate = 0.0
        assert gpt(batch(model)) != whole
        site.rate = 0.3


def test_outside_training_nothing_is_dropped():
    data, plain = batch(GPT3), build(GPT3)
    assert torch.equal(build(dataclasses.replace(GPT3, dropout=0.3)).eval()(data), plain(data))


def test_half_precision_gives_a_loss_in_fp32_near_that_of_fp64():
    data, gpt = batch(MODERN), build(MODERN)
    truth = gpt(data).item()
    loss = gpt.bfloat16()(data)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(truth, rel=0.01)
