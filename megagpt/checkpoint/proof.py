"""A checksum of a tensor that no layout changes: what proves that a load put every number where it belongs.

    checksum = sum over i, j of  bits(value[i, j]) x weight(0, i) x weight(1, j)    mod 2^64

where bits is the fp32 pattern as a signed 32-bit integer, i the index along the first dim, j the row-major index along
all others (0 if there are none), and weight(d, n) = mix((2^48 d + n) x 0x9E3779B97F4A7C15) | 1 with splitmix64's
finaliser as mix (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"). It is a sum over
elements, so ranks add up what each of them has; the weights tell every place from every other, so a number in the
wrong place changes it.

A save computes it from the boxes that it writes. A load computes it from the optimizer's own flat tensors, whose
places it takes from the cut of the parameter and not from boxes: a mistake in `place` or `boxes` cannot agree with
itself. Cost: one pass over the numbers, on the device where they are.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megagpt.checkpoint.boxes import Box

if TYPE_CHECKING:
    from megagpt.parallel.place import Placed
    from megagpt.parallel.state import Range

_AT_ONCE = 1 << 14  # numbers: products that stay in cache, and few enough that torch does not split them over threads
_MASK = 2**64 - 1


def of_box(value: Tensor, shape: Sequence[int], box: Box) -> int:
    """The part of a tensor's checksum that its elements in `box`, which `value` holds, contribute."""
    rows = torch.arange(box.start[0], box.start[0] + box.size[0]) if shape else torch.zeros(1, dtype=torch.int64)
    columns = torch.zeros((), dtype=torch.int64)
    for whole, start, size in zip(shape[1:], box.start[1:], box.size[1:], strict=True):
        columns = columns.unsqueeze(-1) * whole + torch.arange(start, start + size)
    columns = columns.reshape(-1)
    return _sum(value.reshape(len(rows), len(columns)), _weights(0, rows), _weights(1, columns))


def of_state(ranges: Iterable[Range], kinds: Sequence[str]) -> dict[tuple[str, str], int]:
    """(parameter, kind) -> the part of its checksum that this rank answers for, of flat ranges of local parameters."""
    found: dict[tuple[str, str], int] = defaultdict(int)
    for part in ranges:
        if not part.placed.owned:
            continue
        rows, columns = _local_weights(part.placed)
        for kind, flat in zip(kinds, part.tensors, strict=True):
            found[part.placed.name, kind] += _of_flat(flat, part.start, rows, columns)
    return {key: value & _MASK for key, value in found.items()}


def _of_flat(flat: Tensor, start: int, rows: Tensor, columns: Tensor) -> int:
    """Of the elements [start, start + n) of a matrix in row-major order, whose rows and columns weigh so much."""
    total, width, at, stop = 0, len(columns), start, start + flat.numel()
    while at < stop:
        row, column = divmod(at, width)
        count = width if column == 0 and stop - at >= width else min(width - column, stop - at)
        lines = (stop - at) // width if count == width else 1
        part = flat[at - start : at - start + lines * count].view(lines, count)
        total += _sum(part, rows[row : row + lines], columns[column : column + count])
        at += lines * count
    return total


def _local_weights(placed: Placed) -> tuple[Tensor, Tensor]:
    """The weights of a local parameter's rows and columns; 0 where it is padding, or another rank's to answer for."""
    sizes = [placed.local_shape[0] if placed.local_shape else 1, math.prod(placed.local_shape[1:])]
    weights = [_weights(dim, torch.arange(size)) for dim, size in enumerate(sizes)]
    if placed.cut is not None:
        dim = placed.cut.dim
        index = torch.cat([torch.arange(part.start, part.stop) for part in placed.cut.ranges])
        owned = torch.cat([torch.full((len(part),), int(part.owned)) for part in placed.cut.ranges])
        weights[dim] = _weights(dim, index) * owned * (index < placed.shape[dim])
    return weights[0], weights[1]


def _sum(value_RC: Tensor, rows_R: Tensor, columns_C: Tensor) -> int:
    """Sum of bits(value) x rows x columns, mod 2^64."""
    bits_RC = value_RC.detach().to(torch.float32).view(torch.int32)
    if bits_RC.is_cpu:
        return _sum_in_one_pass(bits_RC.numpy(), rows_R.numpy(), columns_C.numpy())
    return _sum_on_device(bits_RC, rows_R.to(bits_RC.device), columns_C.to(bits_RC.device))


def _sum_in_one_pass(bits_RC: np.ndarray, rows_R: np.ndarray, columns_C: np.ndarray) -> int:
    """The same on the CPU, four times faster than torch, which has to write every product to memory."""
    if len(columns_C) == 1:  # the inner loop is to be the long one
        return int((np.einsum("rc,r->c", bits_RC, rows_R) * columns_C).sum()) & _MASK
    return int((np.einsum("rc,c->r", bits_RC, columns_C) * rows_R).sum()) & _MASK


def _sum_on_device(bits_RC: Tensor, rows_R: Tensor, columns_C: Tensor) -> int:
    """The same where torch multiplies no matrices of integers: down the columns first, some rows at a time."""
    total_C = torch.zeros_like(columns_C)
    step = max(1, _AT_ONCE // len(columns_C))
    for start in range(0, len(rows_R), step):
        part_RC = bits_RC[start : start + step].to(torch.int64)
        total_C += part_RC.mul_(rows_R[start : start + step, None]).sum(0)
    return int((total_C * columns_C).sum()) & _MASK


def _weights(dim: int, index: Tensor) -> Tensor:
    """Odd 64-bit numbers that look random, one for each index along a dim."""
    value = (index + (dim << 48)) * _signed(0x9E3779B97F4A7C15)
    value = (value ^ _shifted(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shifted(value, 27)) * _signed(0x94D049BB133111EB)
    return (value ^ _shifted(value, 31)) | 1


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Shifted right as an unsigned number, which torch does not have."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def differing(expected: dict[str, dict[str, Any]], found: dict[tuple[str, str], int]) -> str | None:
    """The first tensor whose checksum in a manifest is not the one found, in words, or None."""
    for name, kinds in expected.items():
        for kind, digits in kinds.items():
            if found[name, kind] != int(digits, 16):
                return f"{kind} of {name} has the checksum {found[name, kind]:016x}, in the manifest {digits}"
    return None
