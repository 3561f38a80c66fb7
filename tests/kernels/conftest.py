"""Kernels run in Triton's interpreter where there is no GPU; that must be chosen before triton is imported."""

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def bfloat16_rounds(monkeypatch):
    """On a CPU: the interpreter's bfloat16, repaired."""
    if not torch.cuda.is_available():
        from tests.kernels.interpreter import repair_bfloat16

        repair_bfloat16(monkeypatch)


@pytest.fixture
def careful(monkeypatch, bfloat16_rounds):
    """On a CPU: a watch for races, accesses outside the tensors, and memory that stays unwritten."""
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        yield
        return
    from tests.kernels.interpreter import watched

    with watched(monkeypatch) as watch, np.errstate(over="ignore"):  # as on a GPU, exp may go to infinity
        yield
    assert not watch.errors, watch.errors[:5]
