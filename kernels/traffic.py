"""Bytes that every kernel moves, beside those that it cannot do without, counted without a GPU.

    TRITON_INTERPRET=1 python -m megagpt.kernels.traffic sm90 [--full]

Triton's interpreter runs the kernels' own launches with the tiles of an architecture's table, and every lane of every
load and store is counted. *Moved* is what programs ask for, whether L2 or DRAM answers; *least* counts each element
once, however many programs read it. The ratio is how often a kernel goes over its tensors: 1 for one pass. Of
attention it grows with the tokens, since every tile of queries reads the keys that it sees.
Inputs are fp16, which the interpreter computes right and for which the tables give the tiles of all half precision.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

from megagpt.kernels import tuning
from megagpt.kernels.cases import cases


@dataclass(frozen=True)
class Traffic:
    """Bytes of global memory of one launch."""

    kernel: str
    moved: int
    least: int


class _Count:
    """Elements that one launch loads and stores, and which of them at least once."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        storages = sorted({(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors})
        self.starts = np.array([start for start, _ in storages], np.int64)
        self.offsets = np.cumsum([0, *(size for _, size in storages)])
        self.widths = {kind: np.zeros(self.offsets[-1], np.uint8) for kind in ("load", "store")}
        self.moved = 0

    def add(self, kind: str, pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
        addresses = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64)
        storage = np.searchsorted(self.starts, addresses, side="right") - 1
        self.widths[kind][addresses - self.starts[storage] + self.offsets[storage]] = itemsize
        self.moved += addresses.size * itemsize

    def least(self) -> int:
        return sum(int(width.sum(dtype=np.int64)) for width in self.widths.values())


@contextlib.contextmanager
def counting() -> Iterator[list[Traffic]]:
    """Inside, every launch that the interpreter runs adds its traffic to the list."""
    builder, grid = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, run = builder.create_masked_load, builder.create_masked_store, grid.__call__
    found: list[Traffic] = []
    count = _Count([])

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal count
        count = _Count([value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)])
        run(self, *args, **kwargs)
        found.append(Traffic(self.fn.__name__, count.moved, count.least()))

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        loaded = load(self, pointers, mask, *rest)
        count.add("load", pointers.data, mask.data, loaded.data.itemsize)
        return loaded

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count.add("store", pointers.data, mask.data, value.data.itemsize)
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        mock.patch.object(grid, "__call__", launch),
    ):
        yield found


def measure(architecture: str, chosen: Iterator[tuple[str, Callable[[], None]]]) -> dict[str, list[Traffic]]:
    """Case -> the traffic of its launches, in their order."""
    found = {}
    with mock.patch.object(tuning, "architecture", return_value=architecture):
        for case, launch in chosen:
            with counting() as found[case]:
                launch()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("architecture", help="whose table of tiles to use, such as sm90")
    parser.add_argument("--full", action="store_true", help="every table entry")
    options = parser.parse_args()
    found = measure(options.architecture, cases(torch.float16, full=options.full))
    json.dump({case: [asdict(one) for one in traffic] for case, traffic in found.items()}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
