"""Read a checkpoint onto any layout: each rank finds the boxes that meet what it holds, and reads those bytes only.

Before anything is used, every file's size and hash are checked (each rank checks its share of the files, some at a
time) and the boxes are proven to tile every tensor of the model exactly.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megagpt.checkpoint import boxes
from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.folders import Folder, unsealed
from megagpt.checkpoint.lineage import MANIFEST, Commit, Unusable, history
from megagpt.checkpoint.save import FORMAT_VERSION, KINDS
from megagpt.checkpoint.tensors import Hash, TensorFile, hashed
from megagpt.errors import UserError
from megagpt.parallel.ranks import lowest_over_ranks
from megagpt.parallel.state import Slice

_THREADS = 4


@dataclass(frozen=True)
class Stored:
    """One box of a tensor in a rank's file."""

    box: Box
    file: str
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
    path = f"{commit.folder}/{MANIFEST}"
    try:
        data = commit.folder.read(MANIFEST)
        version = _version(data)
        content = unsealed(data) if version == FORMAT_VERSION else {}
        shapes, stored = _tensors(content) if version == FORMAT_VERSION else ({}, {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint's manifest: {error}.") from error
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


def _version(data: bytes) -> int:
    """The format that a manifest says it has; this program's own if it is too damaged to say."""
    try:
        return int(json.loads(data)["format_version"])
    except (ValueError, KeyError, TypeError):
        return FORMAT_VERSION


def _tensors(content: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], dict[str, list[Stored]]]:
    """Each tensor's shape, and the boxes that it is stored in."""
    shapes: dict[str, tuple[int, ...]] = {}
    stored: dict[str, list[Stored]] = defaultdict(list)
    for part in content["files"]:
        if "/" in part["file"]:
            raise ValueError(f"a file of it lies elsewhere: {part['file']}")
        for item in part["boxes"]:
            shapes[item["tensor"]] = tuple(item["shape"])
            box = Box(tuple(item["start"]), tuple(item["size"]))
            stored[item["tensor"]].append(Stored(box, part["file"], item["keys"]))
    return shapes, stored


def fault_in_files(manifest: Manifest, *, rank: int = 0, ranks: int = 1) -> str | None:
    """The first damaged file among this rank's share of the files, in words, or None."""
    files = manifest.header["files"][rank::ranks]
    with ThreadPoolExecutor(_THREADS) as pool:
        faults = pool.map(lambda part: _fault_in_file(manifest.commit.folder, part), files)
        return next((fault for fault in faults if fault), None)


def _fault_in_file(folder: Folder, part: dict[str, Any]) -> str | None:
    path, digest = f"{folder}/{part['file']}", Hash()
    try:
        size = folder.size(part["file"])
        if size is None:
            return f"{path} is missing"
        if size != part["bytes"]:
            return f"{path} has {size:,} bytes instead of {part['bytes']:,}"
        for _ in hashed(folder.chunks(part["file"]), digest):
            pass
    except OSError as error:
        return f"{path} cannot be read: {error}"
    if digest.hexdigest() != part["xxh3_128"]:
        return f"{path} has changed since it was written (xxh3_128)"
    return None


def newest_valid(
    root: Folder, *, rank: int = 0, ranks: int = 1, before: int | None = None
) -> tuple[Manifest | None, list[str]]:
    """The newest undamaged checkpoint under `root`, and what was wrong with the ones passed over. On every rank alike.

    With `before`, of those of a step before that one.
    Raises UserError if there are checkpoints and none is usable: starting anew would silently lose the run.
    """
    faults: list[str] = []
    damaged = False
    for found in history(root):
        if isinstance(found, Unusable):
            faults.append(found.fault)
            continue
        if before is not None and found.step >= before:
            continue
        try:
            manifest = read_manifest(found)
            fault = fault_in_files(manifest, rank=rank, ranks=ranks)
        except UserError as error:
            manifest, fault = None, str(error)
        failed = lowest_over_ranks(rank if fault else ranks)
        if failed == ranks:
            return manifest, faults
        damaged = True
        faults.append(fault or f"{found} is damaged, as rank {failed} found")
    if damaged:
        raise UserError(
            f"no checkpoint under {root} is usable: {'; '.join(faults)}.",
            "Restore one of the files from a copy, or start a new run in another folder.",
        )
    return None, faults


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


def load(manifest: Manifest, held: Sequence[Slice]) -> int:
    """Fill `held` with the checkpoint's state; returns how many tensors (whole or in part) were filled.

    The caller has checked the files and the model. Every element of `held` is read: there are no defaults.
    """
    readers = _Readers(manifest.commit.folder)
    for part in held:
        for kind in KINDS:
            _fill(getattr(part, kind), part.box, kind, manifest.stored[part.name], readers)
    return len({part.name for part in held})


def weights(manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
    """Each whole fp32 weight by global name, one at a time, on the CPU."""
    return ((name, value) for _, name, value in whole_tensors(manifest, kinds=("weight",)))


def whole_tensors(manifest: Manifest, *, kinds: Sequence[str] = KINDS) -> Iterator[tuple[str, str, Tensor]]:
    """(kind, global name, fp32 value) of each whole tensor, one at a time, on the CPU."""
    read = reader_of(manifest)
    return ((kind, name, read(kind, name)) for name in manifest.shapes for kind in kinds)


def reader_of(manifest: Manifest) -> Callable[[str, str], Tensor]:
    """A function from (kind, global name) to the whole fp32 tensor."""
    readers = _Readers(manifest.commit.folder)

    def read(kind: str, name: str) -> Tensor:
        shape = manifest.shapes[name]
        whole = torch.empty(shape, dtype=torch.float32)
        _fill(whole, Box((0,) * len(shape), shape), kind, manifest.stored[name], readers)
        return whole

    return read


class _Readers:
    """A commit's files of tensors, opened once each."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._open: dict[str, TensorFile] = {}

    def __getitem__(self, name: str) -> TensorFile:
        if name not in self._open:
            self._open[name] = TensorFile(self._folder, name)
        return self._open[name]


def _fill(target: Tensor, box: Box, kind: str, stored: Sequence[Stored], readers: _Readers) -> None:
    """Copy into `target`, which stands for `box`, from all stored boxes that meet it."""
    filled = 0
    for item in stored:
        common = boxes.overlap(box, item.box)
        if common is None:
            continue
        place = target[common.inside(box).slices()]
        readers[item.file].fill(place, item.keys[kind], common.inside(item.box))
        filled += common.elements()
    assert filled == box.elements(), "the manifest's boxes tile the tensor, so they tile every part of it"
