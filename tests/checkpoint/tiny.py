"""A small state, saved without an engine: what tests of the files need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from megagpt.checkpoint import lineage
from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.folders import Folder, folder_at
from megagpt.checkpoint.save import KINDS, commit, write_part
from megagpt.parallel.state import Slice


def state(step: int, *, rows: int = 6) -> list[Slice]:
    """A matrix and a scalar-like vector whose values tell the step."""

    def whole(name: str, shape: tuple[int, ...]) -> Slice:
        value = torch.arange(float(torch.Size(shape).numel())).view(shape) + step
        return Slice(name, shape, Box((0,) * len(shape), shape), value, value * 2, value * 3)

    return [whole("a", (rows, 3)), whole("b", (5,))]


def equal(found: list[Slice], expected: list[Slice]) -> bool:
    """Whether two states are the same, bit for bit."""
    return all(
        torch.equal(getattr(a, kind).view(torch.int32), getattr(b, kind).view(torch.int32))
        for a, b in zip(expected, found, strict=True)
        for kind in KINDS
    )


@contextmanager
def counting_bytes(folder: Folder) -> Iterator[dict[str, int]]:
    """Name of a file -> the bytes that folders of this kind have read of it inside."""
    kind, read = type(folder), dict[str, int]()
    read_into = kind.read_into

    def counted(self: Folder, name: str, start: int, buffer: memoryview) -> None:
        read[name] = read.get(name, 0) + len(buffer)
        read_into(self, name, start, buffer)

    with mock.patch.object(kind, "read_into", counted):
        yield read


def header(step: int) -> dict[str, object]:
    return {"step": step, "counters": {"optimizer_steps": step, "loss_scaler": {}}, "cursor": None, "run": ""}


def save_on_two_ranks(folder: Folder, step: int) -> None:
    """One process plays both ranks: the first has the matrix, the second the vector."""
    for rank, part in enumerate(state(step)):
        write_part(folder, [part], rank)
    commit(folder, header(step), 2)


def run_with_commits(path: Path | str, steps: tuple[int, ...]) -> Folder:
    """A root whose steps are spread over two attempts: the last is the second's."""
    root = folder_at(path)
    generation = lineage.begin(root, None)
    for step in steps[:-1]:
        save_on_two_ranks(lineage.commit_folder(root, generation, step), step)
    generation = lineage.begin(root, next(lineage.commits(root)))
    save_on_two_ranks(lineage.commit_folder(root, generation, steps[-1]), steps[-1])
    return root
