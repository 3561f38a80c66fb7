"""The norms against fp64, alone and fused with the residual's addition and dropout."""

from dataclasses import replace

import pytest
import torch

from megagpt.kernels import norm, tuning
from megagpt.kernels.residual import residual_reference
from megagpt.ops import Mask
from tests.kernels.helpers import DEVICE, DTYPES, assert_as_exact_as_torch, assert_repeats, random, with_gradients

pytestmark = pytest.mark.usefixtures("careful")


def weights(D: int, dtype: torch.dtype):
    return 1 + random(D, dtype=dtype, seed=2) / 2, random(D, dtype=dtype, seed=3)


def mask(samples: int) -> Mask:
    return Mask(0.3, 2**64 - 5, torch.arange(samples, device=DEVICE) + 2**33)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(21, 768), (2, 3, 1031), (1, 1), (7,), (3, 8209)], ids=str)
def test_layernorm_and_its_gradients_are_as_exact_as_torchs(dtype, shape):
    inputs = [random(*shape, dtype=dtype, seed=1) * 2 + 1, *weights(shape[-1], dtype)]
    assert_as_exact_as_torch(norm.layernorm, norm.layernorm_reference, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 6, 64), (33, 97), (2, 12_288)], ids=str)
def test_rmsnorm_and_its_gradients_are_as_exact_as_torchs(dtype, shape):
    inputs = [random(*shape, dtype=dtype, seed=1), weights(shape[-1], dtype)[0]]
    assert_as_exact_as_torch(norm.rmsnorm, lambda x, w: norm.rmsnorm_reference(x, w), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("drop", [False, True])
def test_addition_dropout_and_layernorm_in_one_are_as_exact_as_the_three(dtype, drop):
    shape = (2, 9, 203)
    inputs = [random(*shape, dtype=dtype, seed=1), random(*shape, dtype=dtype, seed=4), *weights(203, dtype)]
    dropout = mask(2) if drop else None

    def reference(x, residual, w, b):
        h = residual_reference(x, residual, None, dropout)
        return norm.layernorm_reference(h, w, b), h

    def kernel(x, residual, w, b):
        return norm.add_layernorm(x, residual, w, b, mask=dropout)

    assert_repeats(kernel, inputs, assert_as_exact_as_torch(kernel, reference, inputs))


def test_addition_and_rmsnorm_in_one_are_as_exact_as_the_two():
    inputs = [random(3, 5, 130, dtype=torch.float32, seed=seed) for seed in (1, 4)] + [weights(130, torch.float32)[0]]

    def reference(x, residual, w):
        return norm.rmsnorm_reference(x + residual, w), x + residual

    assert_as_exact_as_torch(norm.add_rmsnorm, reference, inputs)


def test_the_new_residual_is_rounded_once_and_its_norm_is_that_of_the_rounded_one():
    x, residual = (random(1, 8, 64, dtype=torch.float16, seed=seed) for seed in (1, 4))
    w, b = weights(64, torch.float16)
    y, h = norm.add_layernorm(x, residual, w, b)
    assert torch.equal(h, residual + x)
    assert torch.equal(y, norm.layernorm(h, w, b))


def test_later_tokens_of_a_sequence_drop_what_they_drop_in_the_whole_one():
    inputs = [random(2, 8, 24, dtype=torch.float32, seed=seed) for seed in (1, 4)]
    w, b = weights(24, torch.float32)
    whole = with_gradients(lambda x, r: norm.add_layernorm(x, r, w, b, mask=mask(2)), inputs, torch.float32)
    x, residual = later = [tensor[:, 5:].detach().requires_grad_() for tensor in inputs]
    out = norm.add_layernorm(x, residual, w, b, mask=replace(mask(2), first_token=5))
    upstream = [random(2, 8, 24, dtype=torch.float32, seed=900 + i)[:, 5:] for i in range(2)]
    for found, expected in zip((*out, *torch.autograd.grad(out, later, upstream)), whole, strict=True):
        assert torch.equal(found, expected[:, 5:])


def test_input_that_is_not_contiguous_gives_the_same_bits():
    x = random(24, 96, dtype=torch.float32, seed=1)
    w, b = weights(24, torch.float32)
    assert torch.equal(norm.layernorm(x.T, w, b), norm.layernorm(x.T.contiguous(), w, b))


@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_weight_gradients_do_not_depend_on_more_than_rounding_on_the_number_of_programs(monkeypatch, programs):
    cut = tuning.Tile(rows=2, warps=4, stages=1, programs=programs)
    original = norm.tile
    monkeypatch.setattr(norm, "tile", lambda name, *rest: cut if name == "norm_backward" else original(name, *rest))
    inputs = [random(11, 48, dtype=torch.float32, seed=1), *weights(48, torch.float32)]
    assert_as_exact_as_torch(norm.layernorm, norm.layernorm_reference, inputs)


def test_gradients_agree_with_finite_differences_in_fp64():
    inputs = [
        random(*shape, dtype=torch.float64, seed=5).requires_grad_() for shape in ((1, 2, 5), (1, 2, 5), (5,), (5,))
    ]
    dropout = mask(1)
    assert torch.autograd.gradcheck(lambda x, r, w, b: norm.add_layernorm(x, r, w, b, mask=dropout), inputs)


def test_rows_of_zeros_give_finite_results():
    x = torch.zeros(4, 32, device=DEVICE, requires_grad=True)
    w, b = weights(32, torch.float32)
    norm.layernorm(x, w, b).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.ones(7)}, r"w has shape \(7,\), but must have \(8,\)"),
        ({"x": torch.ones(4, 8, dtype=torch.int32)}, "x is torch.int32, but must be float16"),
        ({"w": torch.ones(8, dtype=torch.float16)}, "w is torch.float16, but x is torch.float32"),
        ({"x": torch.ones(1, 20_000)}, "x has 20,000 features, but must have from 1 to 16,384"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"x": torch.ones(4, 8), "w": torch.ones(8), "b": torch.zeros(8)} | change
    with pytest.raises(ValueError, match=message):
        norm.layernorm(arguments["x"], arguments["w"], arguments["b"])
