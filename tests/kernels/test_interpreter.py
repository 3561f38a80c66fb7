# pyright: reportArgumentType=false, reportCallIssue=false
"""The test-only repairs and watches do what the other tests rely on."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.helpers import DEVICE
from tests.kernels.interpreter import rounded, watched, widened

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the interpreter is for machines without a GPU")


@triton.jit
def copy(x, y, n, shift, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at // shift, tl.load(x + at, mask=at < n, other=0.0), mask=at < n)


@triton.jit
def twice(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at) * 2 + tl.load(x + at).to(tl.float32).to(tl.bfloat16))


def test_bfloat16_rounds_to_nearest_even_as_torch_does():
    values = np.random.default_rng(1).standard_normal(4096).astype(np.float32)
    expected = torch.from_numpy(values).bfloat16()
    assert np.array_equal(widened(rounded(values)), expected.float().numpy())


def test_bfloat16_arithmetic_in_a_kernel_is_exact_where_it_must_be(bfloat16_rounds):
    x = torch.randn(64, generator=torch.Generator().manual_seed(1)).bfloat16()
    y = torch.zeros_like(x)
    twice[(1,)](x, y, BLOCK=64)
    assert torch.equal(y, x * 2 + x)


def test_the_watch_finds_a_read_outside_of_the_tensors(monkeypatch):
    x, y = torch.zeros(48), torch.zeros(4096)
    with watched(monkeypatch) as watch:
        copy[(2,)](x, y, 64, 1, BLOCK=32)
    assert any("outside all tensors" in error for error in watch.errors)


def test_the_watch_finds_two_programs_that_write_one_address(monkeypatch):
    x, y = torch.zeros(32), torch.zeros(32)
    with watched(monkeypatch) as watch:
        copy[(2,)](x, y, 32, 32, BLOCK=16)
    assert any("race" in error for error in watch.errors)


def test_the_watch_is_silent_on_a_kernel_that_is_right_and_poisons_new_memory(monkeypatch):
    with watched(monkeypatch) as watch:
        x, y = torch.zeros(32), torch.empty(32)
        assert y.isnan().all()
        copy[(2,)](x, y, 32, 1, BLOCK=16)
    assert watch.errors == []
    assert watch.launches == 1
    assert torch.equal(x, y)
