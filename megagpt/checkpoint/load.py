"""Read a checkpoint onto any layout: each rank finds the boxes that meet what it holds, and reads those bytes.

Before anything is used, every file's size and hash are checked (each rank checks its share of the files, some at a
time, and takes what it needs of them on the way) and the boxes are proven to tile every tensor of the model exactly.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megagpt.checkpoint import boxes, proof
from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.folders import Folder, unsealed
from megagpt.checkpoint.lineage import MANIFEST, Commit, Unusable, history
from megagpt.checkpoint.save import FORMAT_VERSION, KINDS
from megagpt.checkpoint.tensors import Hash, TensorFile, Wanted, hashed
from megagpt.errors import RunFailure, UserError
from megagpt.parallel.ranks import lowest_over_ranks, wrapping_sums_over_ranks
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
    return load_checked(manifest, (), rank=rank, ranks=ranks)


def load_checked(manifest: Manifest, held: Sequence[Slice], *, rank: int = 0, ranks: int = 1) -> str | None:
    """Fill `held` with the checkpoint's state, and check this rank's share of its files on the way.

    Returns the first fault in words, or None; the caller makes sure that no rank found one before using the state. Of
    the files in its share a rank reads every byte, once; of others only what it needs.
    """
    wanted = _wanted(manifest, held)
    share = {part["file"]: part for part in manifest.header["files"][rank::ranks]}
    folder = manifest.commit.folder
    with ThreadPoolExecutor(_THREADS) as pool:
        checked = pool.map(lambda part: fault_in_file(folder, part, wanted.get(part["file"], ())), share.values())
        others = [file for file in wanted if file not in share]
        filled = pool.map(lambda file: _fault_in_filling(folder, file, wanted[file]), others)
        return next((fault for fault in (*checked, *filled) if fault), None)


def fault_in_file(folder: Folder, part: dict[str, Any], wanted: Iterable[Wanted] = ()) -> str | None:
    """What is wrong with a file that `part` of a manifest describes, or None; `wanted` of it is filled on the way."""
    path, digest = f"{folder}/{part['file']}", Hash()
    try:
        size = folder.size(part["file"])
        if size is None:
            return f"{path} is missing"
        if size != part["bytes"]:
            return f"{path} has {size:,} bytes instead of {part['bytes']:,}"
        for _ in hashed(_content(folder, part["file"], wanted), digest):
            pass
    except OSError as error:
        return f"{path} cannot be read: {error}"
    if digest.hexdigest() != part["xxh3_128"]:
        return f"{path} has changed since it was written (xxh3_128)"
    return None


def _content(folder: Folder, name: str, wanted: Iterable[Wanted]) -> Iterator[bytes | memoryview]:
    """All of a file; what is wanted of it is filled, unless its header does not say where that is, being damaged."""
    try:
        return TensorFile(folder, name).chunks(wanted)
    except (ValueError, KeyError, TypeError):
        return folder.chunks(name)


def _fault_in_filling(folder: Folder, name: str, wanted: Sequence[Wanted]) -> str | None:
    try:
        TensorFile(folder, name).fill(wanted)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder}/{name} cannot be read: {error}"
    return None


def _wanted(manifest: Manifest, held: Sequence[Slice]) -> dict[str, list[Wanted]]:
    """File -> the boxes of it that `held` consists of. Every element of `held` is in one: there are no defaults."""
    found: dict[str, list[Wanted]] = defaultdict(list)
    for part in held:
        for kind in KINDS:
            target, filled = getattr(part, kind), 0
            for item in manifest.stored[part.name]:
                common = boxes.overlap(part.box, item.box)
                if common is not None:
                    place = target[common.inside(part.box).slices()]
                    found[item.file].append(Wanted(place, item.keys[kind], common.inside(item.box)))
                    filled += common.elements()
            assert filled == part.box.elements(), "the manifest's boxes tile the tensor, so they tile every part of it"
    return found


def newest_valid(
    root: Folder,
    *,
    rank: int = 0,
    ranks: int = 1,
    before: int | None = None,
    read: Callable[[Manifest], str | None] | None = None,
) -> tuple[Manifest | None, list[str]]:
    """The newest undamaged checkpoint under `root`, and what was wrong with the ones passed over. On every rank alike.

    With `before`, of those of a step before that one. `read` looks for a fault in this rank's share of the files, and
    may load on the way (`load_checked`); without it they are only checked.
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
            manifest, fault = read_manifest(found), None
        except UserError as error:
            manifest, fault = None, str(error)
        if manifest is not None:
            fault = read(manifest) if read else fault_in_files(manifest, rank=rank, ranks=ranks)
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


def load(manifest: Manifest, held: Sequence[Slice]) -> None:
    """Fill `held` with the checkpoint's state. The caller has checked the files and the model."""
    for file, wanted in _wanted(manifest, held).items():
        TensorFile(manifest.commit.folder, file).fill(wanted)


def weights(manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
    """Each whole fp32 weight by global name, one at a time, on the CPU."""
    return ((name, value) for _, name, value in whole_tensors(manifest, kinds=("weight",)))


def whole_tensors(manifest: Manifest, *, kinds: Sequence[str] = KINDS) -> Iterator[tuple[str, str, Tensor]]:
    """(kind, global name, fp32 value) of each whole tensor, one at a time, on the CPU."""
    read = reader_of(manifest)
    return ((kind, name, read(kind, name)) for name in manifest.shapes for kind in kinds)


def reader_of(manifest: Manifest) -> Callable[[str, str], Tensor]:
    """A function from (kind, global name) to the whole fp32 tensor."""
    files: dict[str, TensorFile] = {}

    def read(kind: str, name: str) -> Tensor:
        shape = manifest.shapes[name]
        whole = torch.empty(shape, dtype=torch.float32)
        for item in manifest.stored[name]:
            if item.file not in files:
                files[item.file] = TensorFile(manifest.commit.folder, item.file)
            inside = Box((0,) * len(shape), item.box.size)
            files[item.file].fill([Wanted(whole[item.box.slices()], item.keys[kind], inside)])
        return whole

    return read


def proven(manifest: Manifest, found: dict[tuple[str, str], int]) -> bool:
    """Whether the manifest has checksums to prove a load by. Every rank must call it.

    `found` is what this rank's part of the loaded state contributes to them (checkpoint.proof). Raises RunFailure on
    every rank if the sums differ: what is in memory is then not what was saved.
    """
    expected = manifest.header.get("checksums")
    if expected is None:
        return False
    keys = [(name, kind) for name in expected for kind in KINDS]
    sums = wrapping_sums_over_ranks([found.get(key, 0) for key in keys])
    fault = proof.differing(expected, dict(zip(keys, sums, strict=True)))
    if fault:
        raise RunFailure(
            f"{manifest.commit} was read without a fault, and is not what the ranks hold now: {fault}.",
            "A device or memory is faulty, or this megagpt puts tensors in the wrong place.",
            cause="corruption",
        )
    return True
