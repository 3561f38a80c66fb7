"""Rotary positions, GELU, SwiGLU and the end of a branch, against fp64."""

from dataclasses import replace

import pytest
import torch

from megagpt import ops
from megagpt.kernels.gelu import gelu, gelu_reference
from megagpt.kernels.residual import add_residual, dropout, residual_reference
from megagpt.kernels.rotary import rotary
from megagpt.kernels.swiglu import swiglu, swiglu_reference
from tests.kernels.helpers import DEVICE, DTYPES, assert_as_exact_as_torch, assert_repeats, random

pytestmark = pytest.mark.usefixtures("careful")


def mask(samples, rate=0.3):
    return ops.Mask(rate, 2**64 - 5, torch.arange(samples, device=DEVICE) + 2**40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "G", "K"), [(6, 2, 80), (1, 1, 2), (3, 3, 64)])
def test_rotary_turns_queries_and_keys_as_exactly_as_torch(dtype, N, G, K):
    q, k = random(2, 9, N, K, dtype=dtype, seed=1), random(2, 9, G, K, dtype=dtype, seed=2)
    for positions in (torch.arange(9, device=DEVICE) * 300, torch.arange(18, device=DEVICE).view(2, 9)):
        assert_as_exact_as_torch(
            lambda q, k, at=positions: rotary(q, k, at, 1e4),
            lambda q, k, at=positions: ops.rotary(q, k, at, 1e4),
            [q, k],
        )


def test_rotary_of_slices_gives_the_bits_of_separate_tensors():
    q, k, _ = random(2, 5, 8, 16, dtype=torch.float32, seed=1).split((4, 2, 2), 2)
    at = torch.arange(5, device=DEVICE)
    for sliced, whole in zip(rotary(q, k, at, 1e4), rotary(q.contiguous(), k.contiguous(), at, 1e4), strict=True):
        assert torch.equal(sliced, whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 37, 300), (1, 1), (5, 1030)], ids=str)
def test_gelu_and_its_bias_are_as_exact_as_torchs(dtype, shape):
    x, b = random(*shape, dtype=dtype, seed=1) * 3, random(shape[-1], dtype=dtype, seed=2)
    assert_repeats(gelu, [x, b], assert_as_exact_as_torch(gelu, gelu_reference, [x, b]))
    assert_as_exact_as_torch(lambda x: gelu(x), ops.gelu, [x])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 37, 300), (1, 2), (5, 1030)], ids=str)
def test_swiglu_is_as_exact_as_torchs(dtype, shape):
    assert_as_exact_as_torch(swiglu, swiglu_reference, [random(*shape, dtype=dtype, seed=1)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_end_of_a_branch_is_as_exact_as_its_parts(dtype):
    x, residual = (random(2, 13, 301, dtype=dtype, seed=seed) for seed in (1, 2))
    b = random(301, dtype=dtype, seed=3)
    fused = lambda x, r, b: add_residual(x, r, b_D=b, mask=mask(2))  # noqa: E731
    found = assert_as_exact_as_torch(fused, lambda x, r, b: residual_reference(x, r, b, mask(2)), [x, residual, b])
    assert_repeats(fused, [x, residual, b], found)
    assert_as_exact_as_torch(add_residual, lambda x, r: residual_reference(x, r, None, None), [x, residual])


@pytest.mark.parametrize("D", [1, 3, 130])
def test_dropout_drops_what_the_reference_drops(D):
    x = torch.ones(3, 7, D, device=DEVICE)
    assert torch.equal(dropout(x, mask(3)) > 0, ops.dropout(x, mask(3)) > 0)


def test_a_part_of_the_tokens_loses_what_it_would_lose_in_the_whole():
    x = torch.ones(2, 8, 12, device=DEVICE)
    whole = dropout(x, mask(2))
    assert torch.equal(dropout(x[:, 5:], replace(mask(2), first_token=5)), whole[:, 5:])


def test_an_addition_without_dropout_and_bias_hands_its_gradient_on():
    x, residual = (random(2, 3, 20, dtype=torch.float16, seed=seed).requires_grad_() for seed in (1, 2))
    y = add_residual(x, residual)
    assert torch.equal(y, residual + x)
    upstream = random(2, 3, 20, dtype=torch.float16, seed=3)
    assert all(torch.equal(grad, upstream) for grad in torch.autograd.grad(y, (x, residual), upstream))


def test_an_overflow_in_a_gate_is_a_limit_and_not_a_nan():
    x = torch.tensor([[-1e4, 1e4, 1.0, 1.0]], device=DEVICE, requires_grad=True)
    y = swiglu(x)
    y.sum().backward()
    assert torch.equal(y, torch.tensor([[-0.0, 1e4]], device=DEVICE))
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert torch.equal(gelu(x)[0, :2], torch.tensor([-0.0, 1e4], device=DEVICE))


def test_gradients_agree_with_finite_differences_in_fp64():
    x, residual = (random(1, 3, 5, dtype=torch.float64, seed=seed).requires_grad_() for seed in (1, 2))
    b = random(5, dtype=torch.float64, seed=3).requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda x, r, b: add_residual(x, r, b_D=b, mask=mask(1)), [x, residual, b])
    assert check(gelu, [x, b])
    pairs = [random(1, 2, heads, 4, dtype=torch.float64, seed=heads).requires_grad_() for heads in (1, 2)]
    assert check(lambda q, k: rotary(q, k, torch.arange(2, device=DEVICE), 10.0), pairs)
    assert check(swiglu, [pairs[0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gelu(torch.ones(2, 3), torch.ones(2)), r"b has shape \(2,\), but must have \(3,\)"),
        (lambda: swiglu(torch.ones(2, 3)), "gate_up has 3 features, but must have an even number"),
        (lambda: add_residual(torch.ones(2, 3), None), r"x has shape \(2, 3\), but must be \[B, T, D\]"),
        (lambda: add_residual(torch.ones(1, 2, 3), torch.ones(1, 2, 4)), r"residual has shape \(1, 2, 4\)"),
        (lambda: rotary(torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1, 3), torch.arange(2), 1e4), "with an even K"),
        (lambda: rotary(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4), torch.arange(3), 1e4), "positions has shape"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
