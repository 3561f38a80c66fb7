# pyright: reportArgumentType=false, reportCallIssue=false
"""What every kernel's launcher shares: checks of its arguments, the dtype it sums in, and the sum over partials.

Legend: P partials, D features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagpt.kernels.tuning import tile

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Mask(Protocol):
    """A dropout mask: `megagpt.ops` has it; kernels only read it."""

    @property
    def rate(self) -> float: ...
    @property
    def key(self) -> int: ...
    @property
    def samples_B(self) -> Tensor: ...
    @property
    def first_token(self) -> int: ...
    def keep_BNTC(self, heads: int, tokens: int, columns: int) -> Tensor: ...


def check_floats(**tensors: Tensor | None) -> None:
    """All given tensors share one device and one of the four float dtypes. Raises ValueError that names the first one
    that does not.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first_name, first = next(iter(given.items()))
    if first.dtype not in DTYPES:
        raise ValueError(f"{first_name} is {first.dtype}, but must be float16, bfloat16, float32 or float64.")
    for name, tensor in given.items():
        if tensor.dtype != first.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, but {first_name} is {first.dtype}: they must be equal.")
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, but {first_name} is on {first.device}.")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raises ValueError unless `tensor` has exactly this shape."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but must have {tuple(shape)}.")


def signed(key: int) -> int:
    """A 64-bit key as the signed integer that an operator's schema takes."""
    return (key + 2**63) % 2**64 - 2**63


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """What sums and statistics are kept in: fp32, and fp64 for fp64, which only checks of gradients use."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of saved statistics and partial sums: as `accumulator`, for torch."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The context in which a launch reaches the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@triton.jit
def _sum_partials(partials, total, P, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program, COLUMNS features: partials in their order, so that the sum is the same on every run."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([ROWS, COLUMNS], partials.dtype.element_ty)
    for first in range(0, P, ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        valid = (rows[:, None] < P) & (columns[None, :] < D)
        sums += tl.load(partials + rows[:, None] * D + columns[None, :], mask=valid, other=0.0)
    tl.store(total + columns, tl.sum(sums, 0).to(total.dtype.element_ty), mask=columns < D)


def sum_partials(partials_PD: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over partials, in a fixed order, as [D] of `dtype`."""
    P, D = partials_PD.shape
    total_D = torch.empty(D, dtype=dtype, device=partials_PD.device)
    cut = tile("sum_partials", partials_PD.dtype, 1, partials_PD.device)
    with on(total_D):
        _sum_partials[(triton.cdiv(D, cut.columns),)](
            partials_PD, total_D, P, D, ROWS=cut.rows, COLUMNS=cut.columns, **cut.options()
        )
    return total_D
