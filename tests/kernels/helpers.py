"""The rule by which kernels are judged, and what the tests of all kernels share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Standard normal; what it is rounded to in `dtype` is the exact input of every implementation."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def with_gradients(
    function: Callable[..., Tensor | Sequence[Tensor]], inputs: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """The outputs, and the gradients of all inputs for fixed gradients of the outputs, random numbers of `dtype`."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    upstream = [random(*out.shape, dtype=dtype, seed=900 + i).to(out.dtype) for i, out in enumerate(outputs)]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def assert_as_exact_as_torch(
    kernel: Callable, reference: Callable, inputs: Sequence[Tensor], *, factor: float = 2.0
) -> list[Tensor]:
    """Outputs and all gradients err at most `factor` times as much as plain torch in the same dtype, against fp64.

    A floor is allowed, of eps times the largest input times the largest gradient that comes in: where plain torch
    happens to be exact (documents of one token), the kernel still rounds what only cancels in exact arithmetic.
    Returns the kernel's outputs and gradients.
    """
    dtype = inputs[0].dtype
    scale = (
        max(tensor.abs().max().item() for tensor in inputs) * 4.0
    )  # of 10,000 normal numbers the largest is below 4
    truth = with_gradients(reference, [tensor.double() for tensor in inputs], dtype)
    plain = with_gradients(reference, inputs, dtype)
    found = with_gradients(kernel, inputs, dtype)
    for index, (right, near, ours) in enumerate(zip(truth, plain, found, strict=True)):
        assert ours.shape == near.shape
        floor = torch.finfo(dtype).eps * max(scale, right.abs().max().item())
        bound = factor * (near - right).abs().max().item() + floor
        error = (ours - right).abs().max().item()
        assert error <= bound, f"result {index}: error {error:.3g} is over {bound:.3g}"
    return found


def assert_repeats(kernel: Callable, inputs: Sequence[Tensor], first: Sequence[Tensor] | None = None) -> None:
    """A second run gives the same bits in every output and gradient."""
    first = with_gradients(kernel, inputs, inputs[0].dtype) if first is None else first
    second = with_gradients(kernel, inputs, inputs[0].dtype)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
