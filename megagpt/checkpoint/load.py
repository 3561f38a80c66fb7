"""Read a checkpoint onto any layout: each rank finds the boxes that meet what it holds, and reads those bytes only.

Before anything is used, every file's size and SHA-256 are checked (each rank checks its share of the files) and the
boxes are proven to tile every tensor of the model exactly.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from megagpt.checkpoint import boxes
from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.lineage import MANIFEST, Commit, commits
from megagpt.checkpoint.save import FORMAT_VERSION, KINDS
from megagpt.errors import UserError
from megagpt.files import sha256
from megagpt.parallel.ranks import lowest_over_ranks
from megagpt.parallel.state import Slice


@dataclass(frozen=True)
class Stored:
    """One box of a tensor in a rank's file."""

    box: Box
    file: Path
    keys: dict[str, str]
    """Kind (weight, exp_avg, exp_avg_sq) -> name inside the file."""


@dataclass(frozen=True)
class Manifest:
    """A commit's manifest, read and checked for its own consistency."""

    commit: Commit
    header: dict[str, Any]
    """What the trainer saved beside tensors: run, cursor, counters, step, ..."""
    shapes: dict[str, tuple[int, ...]]
    stored: dict[str, list[Stored]]


def read_manifest(commit: Commit) -> Manifest:
    """The manifest of `commit`. Raises UserError if it is unreadable, newer than this program, or has holes."""
    path = commit.folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"]
        shapes, stored = _tensors(content, commit.folder) if version == FORMAT_VERSION else ({}, {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint's manifest: {error!r}.") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}, and this megagpt reads version {FORMAT_VERSION}.",
            "Install the megagpt that wrote it, or a newer one.",
        )
    for name, shape in shapes.items():
        fault = boxes.fault_in_tiling(shape, [item.box for item in stored[name]])
        if fault:
            raise UserError(f"{path}: the parts of {name} do not make up the tensor: {fault}.")
    return Manifest(commit, content, shapes, stored)


def _tensors(content: dict[str, Any], folder: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, list[Stored]]]:
    """Each tensor's shape, and the boxes that it is stored in."""
    shapes: dict[str, tuple[int, ...]] = {}
    stored: dict[str, list[Stored]] = defaultdict(list)
    for part in content["files"]:
        for item in part["boxes"]:
            shapes[item["tensor"]] = tuple(item["shape"])
            box = Box(tuple(item["start"]), tuple(item["size"]))
            stored[item["tensor"]].append(Stored(box, folder / part["file"], item["keys"]))
    return shapes, stored


def fault_in_files(manifest: Manifest, *, rank: int = 0, ranks: int = 1) -> str | None:
    """The first damaged file among this rank's share of the files, in words, or None."""
    for part in manifest.header["files"][rank::ranks]:
        path = manifest.commit.folder / part["file"]
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != part["bytes"]:
            return f"{path} has {path.stat().st_size:,} bytes instead of {part['bytes']:,}"
        if sha256(path) != part["sha256"]:
            return f"{path} has changed since it was written (SHA-256)"
    return None


def newest_valid(
    root: Path, *, rank: int = 0, ranks: int = 1, before: int | None = None
) -> tuple[Manifest | None, list[str]]:
    """The newest undamaged checkpoint under `root`, and what was wrong with the ones passed over. On every rank alike.

    With `before`, of those of a step before that one.
    Raises UserError if there are checkpoints and none is usable: starting anew would silently lose the run.
    """
    faults: list[str] = []
    for commit in commits(root):
        if before is not None and commit.step >= before:
            continue
        try:
            manifest = read_manifest(commit)
            fault = fault_in_files(manifest, rank=rank, ranks=ranks)
        except UserError as error:
            manifest, fault = None, str(error)
        failed = lowest_over_ranks(rank if fault else ranks)
        if failed == ranks:
            return manifest, faults
        faults.append(fault or f"{commit} is damaged, as rank {failed} found")
    if faults:
        raise UserError(
            f"no checkpoint under {root} is usable: {'; '.join(faults)}.",
            "Restore one of the files from a copy, or start a new run in another folder.",
        )
    return None, []


def check_model(manifest: Manifest, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise UserError, naming the first tensor that differs, unless the checkpoint is of a model of these `shapes`."""
    for name, shape in shapes.items():
        if name not in manifest.shapes:
            raise UserError(f"checkpoint {manifest.commit} is of another model: it has no {name}.")
        if manifest.shapes[name] != shape:
            raise UserError(
                f"checkpoint {manifest.commit} is of another model: {name} is {list(manifest.shapes[name])} there "
                f"and {list(shape)} in this run.",
                "Use the settings in the run's run.toml, or another --out.",
            )
    for name in manifest.shapes:
        if name not in shapes:
            raise UserError(f"checkpoint {manifest.commit} is of another model: this run has no {name}.")


def load(manifest: Manifest, held: Sequence[Slice]) -> None:
    """Fill `held` with the checkpoint's state. The caller has checked the files and the model."""
    readers = _Readers()
    for part in held:
        for kind in KINDS:
            _fill(getattr(part, kind), part.box, kind, manifest.stored[part.name], readers)


def weights(manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
    """Each whole fp32 weight by global name, one at a time, on the CPU."""
    readers = _Readers()
    for name, shape in manifest.shapes.items():
        whole = torch.empty(shape, dtype=torch.float32)
        _fill(whole, Box((0,) * len(shape), shape), "weight", manifest.stored[name], readers)
        yield name, whole


class _Readers:
    """safetensors files, opened once each."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}

    def __getitem__(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safetensors.safe_open(path, framework="pt")
        return self._open[path]


def _fill(target: Tensor, box: Box, kind: str, stored: Sequence[Stored], readers: _Readers) -> None:
    """Copy into `target`, which stands for `box`, from all stored boxes that meet it."""
    filled = 0
    for item in stored:
        common = boxes.overlap(box, item.box)
        if common is None:
            continue
        source = readers[item.file].get_slice(item.keys[kind])[common.inside(item.box).slices()]
        target[common.inside(box).slices()].copy_(source)
        filled += common.elements()
    assert filled == box.elements(), "the manifest's boxes tile the tensor, so they tile every part of it"
