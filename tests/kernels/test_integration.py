# pyright: reportCallIssue=false
"""The kernels as operators of torch, as the model's operators, and in a model that trains."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megagpt import ops
from megagpt.config import Model
from megagpt.data.batch import IGNORE, Batch
from megagpt.errors import UserError
from megagpt.kernels import attention, cross_entropy, gelu, norm, residual, rotary, support, swiglu, tuning
from megagpt.model import build, initialise
from tests.kernels.helpers import DEVICE, random

GPT3 = Model(layers=2, width=32, heads=2, vocabulary=61, context=24, window=6, dropout=0.1, biases="no_qkv")
MODERN = Model(
    layers=2, width=32, heads=4, kv_heads=2, vocabulary=61, context=24, norm="rmsnorm", positions="rotary",
    feed_forward="swiglu", biases="none", qk_norm=True, tied=False,
)  # fmt: skip


def float_inputs(*shapes):
    return [random(*shape, dtype=torch.float32, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


def operators():
    """(operator, arguments) of every forward that has a gradient."""
    samples = torch.arange(2, device=DEVICE)
    q, k, v = float_inputs((2, 6, 4, 16), (2, 6, 2, 16), (2, 6, 2, 16))
    start = torch.zeros(2, 6, dtype=torch.int32, device=DEVICE)
    x, r = float_inputs((2, 3, 8), (2, 3, 8))
    w, b = float_inputs((8,), (8,))
    logits, targets = float_inputs((3, 16))[0], torch.tensor([1, 2, -100], device=DEVICE)
    angle = random(1, 6, 8, dtype=torch.float32, seed=9)
    calls = torch.ops.megagpt
    return [
        (calls.attention, (q, k, v, start, start + 6, samples, 6, 0, 0.25, 2.0, 0.1, 5, 0)),
        (calls.attention, (q, k, v, None, None, None, 6, 0, 0.25, 0.0, 0.0, 0, 0)),
        (calls.norm, (x, r, w, b, samples, 0.1, 5, 7, 1e-5, True)),
        (calls.norm, (x, None, w, None, None, 0.0, 0, 0, 1e-5, False)),
        (calls.cross_entropy, (logits, targets, 0, 13, True)),
        (calls.rotary, (q, k, angle.cos(), angle.sin())),
        (calls.gelu, (x, b)),
        (calls.swiglu, (x,)),
        (calls.residual, (x, r, b, samples, 0.1, 5, 7)),
    ]


@pytest.mark.parametrize("number", range(9))
def test_every_operator_passes_torchs_own_check(number):
    call, arguments = operators()[number]
    torch.library.opcheck(call.default, arguments)


def test_a_whole_block_of_kernels_compiles_without_a_graph_break():
    def block(x, w, b, q, k, v, targets):
        y = gelu.gelu(norm.layernorm(x, w, b), b)
        q, k = rotary.rotary(q, k, torch.arange(6, device=q.device), 1e4)
        o = attention.attention(q, k, v, window=3)
        y = residual.add_residual(y, x) + swiglu.swiglu(torch.cat((y, y), -1))
        return cross_entropy.cross_entropy(y.flatten(0, 1), targets, vocabulary=8).sum() + o.sum()

    inputs = float_inputs((2, 3, 8), (8,), (8,), (1, 6, 2, 16), (1, 6, 1, 16), (1, 6, 1, 16))
    targets = torch.arange(6, device=DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    eager = torch.autograd.grad(block(*inputs, targets), inputs)
    for found, expected in zip(torch.autograd.grad(compiled(*inputs, targets), inputs), eager, strict=True):
        assert torch.equal(found, expected)


def test_attentions_operations_are_counted_by_what_is_visible():
    q, k, v = float_inputs((1, 8, 2, 16), (1, 8, 2, 16), (1, 8, 2, 16))
    for window, pairs in ((None, 36), (3, 21)):
        with FlopCounterMode(display=False) as counter:
            attention.attention(q, k, v, window=window).sum().backward()
        assert counter.get_total_flops() == 14 * 16 * 2 * pairs


def batch(model, step):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, model.vocabulary, (2, model.context + 1), generator=generator).to(DEVICE)
    targets = tokens[:, 1:].clone()
    targets[0, :3] = IGNORE
    ends = torch.tensor([0, 7, model.context, 40, 2 * model.context], dtype=torch.int32, device=DEVICE)
    return Batch(tokens[:, :-1], targets, ends, torch.arange(2, device=DEVICE) + 2 * step)


def losses(model, kernels, weights):
    gpt = build(Model(**{**vars(model), "kernels": kernels}), seed=3).to(DEVICE)
    gpt.load_state_dict(weights)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2)
    found, gradients = [], {}
    for step in range(3):
        loss = gpt(batch(model, step)) / 45
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradients = gradients or {name: weight.grad for name, weight in gpt.named_parameters()}
        optimizer.step()
        found.append(loss.item())
    return found, gradients


@pytest.mark.parametrize("model", [GPT3, MODERN], ids=["gpt3", "modern"])
def test_a_model_trains_to_the_same_losses_on_either_implementation(model, monkeypatch):
    monkeypatch.setattr(support, "obstacle", lambda: "")
    gpt = build(model, seed=3)
    initialise(gpt, model, seed=3)
    by_torch, gradients = losses(model, "torch", gpt.state_dict())
    by_triton, own = losses(model, "triton", gpt.state_dict())
    assert by_triton == pytest.approx(by_torch, rel=1e-5)
    assert by_triton[2] < by_triton[0]
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, atol=1e-6, rtol=1e-4)


def test_auto_takes_triton_where_it_runs_and_says_why_where_it_does_not(monkeypatch):
    monkeypatch.setattr(support, "interpreting", lambda: False)
    monkeypatch.setattr(support, "obstacle", lambda: "")
    assert ops.select("auto").layernorm is norm.layernorm
    assert "Triton" in ops.select("auto").choice
    assert tuning.digest(DEVICE)[:8] in ops.select("auto").choice
    monkeypatch.setattr(support, "obstacle", lambda: "there is no GPU")
    assert ops.select("auto").choice == "torch operators (there is no GPU)"
    assert ops.select("auto").attention is ops.attention
    assert ops.select("torch").choice == "torch operators (as asked for)"


def test_triton_is_refused_and_not_replaced_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(support, "obstacle", lambda: "there is no GPU")
    with pytest.raises(UserError, match=r"model\.kernels = 'triton': the kernels cannot run, because there is no GPU"):
        ops.select("triton")


def test_auto_does_not_train_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(support, "obstacle", lambda: "")
    monkeypatch.setattr(support, "interpreting", lambda: True)
    assert ops.select("auto").attention is ops.attention


@pytest.mark.parametrize(
    ("version", "gpu", "capability", "expected"),
    [
        (None, True, (9, 0), "Triton is not installed"),
        ("3.5.1", True, (9, 0), "Triton is 3.5.1, older than 3.6"),
        ("3.6.0", False, (9, 0), "there is no GPU"),
        ("3.10.0", True, (7, 5), "compute capability is 7.5"),
        ("3.10.0", True, (8, 0), ""),
    ],
)
def test_what_stands_in_the_way_of_the_kernels_is_named(monkeypatch, version, gpu, capability, expected):
    monkeypatch.setattr(support, "triton_version", lambda: version)
    monkeypatch.setattr(support, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    found = support.obstacle()
    assert expected in found
    assert bool(expected) == bool(found)
