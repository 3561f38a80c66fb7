"""Test-only repairs and watches for Triton's interpreter: bfloat16 that rounds, and a detector of races and of reads
or writes outside the tensors.

The interpreter keeps bfloat16 as its bit pattern in uint16 and computes on the patterns; `repair_bfloat16` widens
them to fp32 before every operation and rounds to nearest even after it, as the hardware does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle
COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}
BITWISE = {np.bitwise_and, np.bitwise_or, np.bitwise_xor}


def widened(bits: np.ndarray) -> np.ndarray:
    """Bit patterns of bfloat16 as fp32."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """fp32 as bit patterns of bfloat16, rounded to nearest even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    up = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(values), np.uint16(0x7FC0), ((bits + up) >> np.uint32(16)).astype(np.uint16))


def is_bfloat16(handle: Handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def repair_bfloat16(patch) -> None:
    """Install the repair with pytest's `patch`, which takes it out again."""
    dot, cast, binary, unary = Builder.create_dot, Builder.cast_impl, Builder.binary_op, Builder.unary_op
    narrow, total = Builder.create_fp_to_fp, interpreter.ReduceOps.sum

    def repaired_dot(self, a, b, accumulator, *rest):
        a, b = (Handle(widened(x.data), tl.float32) if is_bfloat16(x) else x for x in (a, b))
        return dot(self, a, b, accumulator, *rest)

    def repaired_cast(self, source, to):
        if is_bfloat16(source) and to.scalar != tl.bfloat16:
            return Handle(widened(source.data).astype(interpreter._get_np_dtype(to)), to.scalar)
        if to.scalar == tl.bfloat16 and not is_bfloat16(source):
            return Handle(rounded(source.data.astype(np.float32)), to.scalar)
        return cast(self, source, to)

    def repaired_binary(self, left, right, operation):
        if not is_bfloat16(left) or operation in BITWISE:
            return binary(self, left, right, operation)
        out = operation(widened(left.data), widened(right.data))
        return Handle(out, tl.int1) if operation in COMPARISONS else Handle(rounded(out), tl.bfloat16)

    def repaired_unary(self, x, operation):
        if is_bfloat16(x):
            return Handle(rounded(operation(widened(x.data))), tl.bfloat16)
        return unary(self, x, operation)

    def repaired_narrow(self, source, to, mode):
        if is_bfloat16(source) or to.scalar == tl.bfloat16:
            return repaired_cast(self, source, to)
        return narrow(self, source, to, mode)

    def repaired_sum(self, x, *rest):
        if x.handle.dtype.scalar != tl.bfloat16:
            return total(self, x, *rest)
        return self.to_tensor(
            rounded(np.sum(widened(x.handle.data), axis=self.axis, keepdims=self.keep_dims)), x.dtype
        )

    def constant(_self, value):  # Triton 3.6 has none
        return Handle(rounded(np.array([value])), tl.bfloat16)

    patch.setattr(Builder, "get_bf16", constant, raising=False)
    patch.setattr(Builder, "create_dot", repaired_dot)
    patch.setattr(Builder, "cast_impl", repaired_cast)
    patch.setattr(Builder, "binary_op", repaired_binary)
    patch.setattr(Builder, "unary_op", repaired_unary)
    patch.setattr(Builder, "create_fp_to_fp", repaired_narrow)
    patch.setattr(interpreter.ReduceOps, "sum", repaired_sum)


NOBODY, SEVERAL = -1, -2  # in the place of a program's number


class Watch:
    """Every address that a launch reads or writes must lie in a tensor of that launch, and programs must not race."""

    def __init__(self) -> None:
        self.launches = 0
        self.errors: list[str] = []

    def begin(self, tensors: list[torch.Tensor]) -> None:
        """A new launch: it runs after the ones before, so it cannot race with them."""
        self.launches += 1
        storages = sorted({(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors})
        self.starts = np.array([start for start, _ in storages], np.int64)
        self.ends = np.array([start + size for start, size in storages], np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.ends - self.starts)])  # of each storage in the arrays below
        self.readers = np.full(self.offsets[-1], NOBODY, np.int32)
        self.writers = np.full(self.offsets[-1], NOBODY, np.int32)

    def check(self, program: int, pointers: Handle, mask: Handle, kind: str) -> None:
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        span = np.searchsorted(self.starts, addresses, side="right") - 1
        inside = (span >= 0) & (addresses < self.ends[np.maximum(span, 0)])
        if not inside.all():
            self.errors.append(f"{int((~inside).sum())} lanes {kind} outside all tensors, program {program}")
        span = span[inside]
        at = addresses[inside] - self.starts[span] + self.offsets[span]
        if not np.isin(self.writers[at], (NOBODY, program)).all():
            self.errors.append(f"program {program} races with one that wrote before, by a {kind}")
        if kind == "read":
            self.readers[at] = np.where(np.isin(self.readers[at], (NOBODY, program)), program, SEVERAL)
            return
        if not np.isin(self.readers[at], (NOBODY, program)).all():
            self.errors.append(f"program {program} writes what another has read")
        self.writers[at] = program


@contextlib.contextmanager
def watched(patch) -> Iterator[Watch]:
    """Watch all launches inside, and fill what `torch.empty` and its kin give there with NaN (or the lowest integer),
    so that whatever a kernel leaves unwritten shows.
    """
    watch = Watch()
    load, store, run = Builder.create_masked_load, Builder.create_masked_store, interpreter.GridExecutor.__call__

    def poisoned(make):
        def call(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)

        return call

    def launch(self, *args, **kwargs):
        watch.begin([argument for argument in (*args, *kwargs.values()) if isinstance(argument, torch.Tensor)])
        return run(self, *args, **kwargs)

    def watched_load(self, pointers, mask, *rest):
        watch.check(self.grid_idx[0], pointers, mask, "read")
        return load(self, pointers, mask, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        watch.check(self.grid_idx[0], pointers, mask, "write")
        return store(self, pointers, value, mask, *rest)

    with patch.context() as inside:
        inside.setattr(Builder, "create_masked_load", watched_load)
        inside.setattr(Builder, "create_masked_store", watched_store)
        inside.setattr(interpreter.GridExecutor, "__call__", launch)
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            inside.setattr(owner, name, poisoned(getattr(owner, name)))
        yield watch
