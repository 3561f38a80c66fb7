"""`megagpt checkpoint ...`: list, show, prove, compare, re-cut and average checkpoints, on a CPU, without a run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from megagpt import config
from megagpt.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from megagpt.checkpoint.lineage import Commit
    from megagpt.checkpoint.load import Manifest


@dataclass(frozen=True, kw_only=True)
class List:
    """The checkpoints that a run can continue from, newest first."""

    place: tyro.conf.Positional[str]
    """A run's folder, or its folder of checkpoints; a path or a URL."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Show:
    """What a checkpoint holds."""

    place: tyro.conf.Positional[str]
    """A checkpoint's folder, or a run's: its newest."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Read every byte of every checkpoint and check it against its hash; exit status 1 if one is damaged."""

    place: tyro.conf.Positional[str]
    """A checkpoint's folder, or a run's: all of its checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Diff:
    """Compare two checkpoints tensor by tensor, whatever their layouts; exit status 1 if they differ."""

    a: tyro.conf.Positional[str]
    """A checkpoint's folder, or a run's: its newest."""
    b: tyro.conf.Positional[str]
    """Another."""
    top: int = 10
    """How many of the tensors that differ are printed, those that differ most first."""


@dataclass(frozen=True, kw_only=True)
class Reshard:
    """Write a checkpoint again, with its state cut into equal files; any layout reads it, as it does the original."""

    place: tyro.conf.Positional[str]
    """A checkpoint's folder, or a run's: its newest."""
    to: str
    """Folder of checkpoints to write; it must hold none. `--checkpoint.folder` makes a run use it."""
    files: int = 8
    """How many files."""


@dataclass(frozen=True, kw_only=True)
class Average:
    """Make a run, at step 0, whose weights are the mean of several checkpoints' of one model."""

    places: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="PLACE ...")]]
    """Checkpoints' folders, or runs': their newest."""
    out: Path
    """Folder of the new run; it must not exist."""


def run_list(options: List) -> int:
    """Print a line a checkpoint."""
    from megagpt.checkpoint.load import read_manifest

    rows: list[dict[str, Any]] = []
    for commit in _commits(options.place):
        try:
            rows.append(_facts(read_manifest(commit)))
        except UserError as error:
            rows.append({"folder": str(commit), "step": commit.step, "fault": str(error)})
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        if "fault" in row:
            print(f"step {row['step']:>9,}  DAMAGED  {row['fault']}")
            continue
        loss = "" if row["evaluation_loss"] is None else f"  held-out loss {row['evaluation_loss']:.4f}"
        size = f"{row['bytes'] / 2**30:,.2f} GiB in {row['files']} files"
        print(f"step {row['step']:>9,}  {row['tokens']:,} tokens  {size}{loss}  {row['folder']}")
    return 0


def run_show(options: Show) -> int:
    """Print where a checkpoint stands, its layout and its tensors."""
    manifest = _newest(options.place)
    facts = _facts(manifest)
    shapes = {name: list(shape) for name, shape in manifest.shapes.items()}
    if options.json:
        print(json.dumps({**facts, "run": manifest.header.get("run"), "tensors": shapes}, indent=2))
        return 0
    for name, value in facts.items():
        print(f"{name:<16} {value}")
    print(f"{'tensors':<16} {len(shapes)}, each with fp32 weight, exp_avg and exp_avg_sq")
    for name, shape in shapes.items():
        print(f"  {name:<56} {shape}  {len(manifest.stored[name])} boxes")
    return 0


def run_verify(options: Verify) -> int:
    """Check all, and print a line each."""
    from megagpt.checkpoint.load import fault_in_files, read_manifest

    damaged = 0
    for commit in _commits(options.place):
        try:
            manifest = read_manifest(commit)
            fault = fault_in_files(manifest)
        except UserError as error:
            manifest, fault = None, str(error)
        damaged += fault is not None
        total = len(manifest.shapes) if manifest is not None else 0
        print(f"{commit}: {fault or f'undamaged, {total} of {total} tensors whole'}")
    return 1 if damaged else 0


def run_diff(options: Diff) -> int:
    """Print how many tensors differ, and which most."""
    import torch

    from megagpt.checkpoint.load import check_model, reader_of, whole_tensors

    a, b = _newest(options.a), _newest(options.b)
    check_model(b, a.shapes)
    read = reader_of(b)
    total, different = 0, []
    for kind, name, value in whole_tensors(a):
        total += 1
        other = read(kind, name)
        if torch.equal(value.view(torch.int32), other.view(torch.int32)):
            continue
        distance = (value.double() - other.double()).abs()
        different.append((float(distance.max()), float(distance.norm() / value.double().norm()), f"{kind}/{name}"))
    print(f"{total - len(different)} of {total} tensors are bitwise equal (step {a.commit.step:,}, {b.commit.step:,})")
    for largest, relative, name in sorted(different, reverse=True)[: options.top]:
        print(f"  {name:<64} largest difference {largest:.3e}, relative norm {relative:.3e}")
    same = all(a.header.get(key) == b.header.get(key) for key in ("step", "cursor", "counters"))
    if not same:
        print("  step, place in the data or counters differ")
    return 0 if same and not different else 1


def run_reshard(options: Reshard) -> int:
    """Write the checkpoint, one file after the other."""
    from megagpt.checkpoint import lineage
    from megagpt.checkpoint.folders import folder_at
    from megagpt.checkpoint.save import commit, write_part

    if options.files < 1:
        raise UserError(f"--files = {options.files} must be at least 1.")
    manifest, root = _newest(options.place), folder_at(options.to)
    if root.names():
        raise UserError(f"{root} is not empty.", "Choose another --to.")
    folder = lineage.commit_folder(root, lineage.begin(root, None), manifest.commit.step)
    for number in range(options.files):
        write_part(folder, list(_share(manifest, number, options.files)), number)
    own = ("format_version", "files", "xxh3_128")
    commit(folder, {key: value for key, value in manifest.header.items() if key not in own}, options.files)
    print(f"{folder}: step {manifest.commit.step:,} in {options.files} files")
    return 0


def _share(manifest: Manifest, number: int, count: int) -> Iterator[Any]:
    """The slices of every tensor that file `number` of `count` gets; no more than these are in memory."""
    import math

    from megagpt.checkpoint import boxes
    from megagpt.checkpoint.load import load
    from megagpt.parallel.state import empty_slice

    for name, shape in manifest.shapes.items():
        elements = math.prod(shape)
        start, stop = (elements * share // count for share in (number, number + 1))
        for box in boxes.of_range(shape, start, stop - start):
            part = empty_slice(name, shape, box)
            load(manifest, [part])
            yield part


def run_average(options: Average) -> int:
    """Write the new run's folder."""
    import shutil

    from megagpt.checkpoint.load import check_model
    from megagpt.commands.transfer import save_first
    from megagpt.files import write_whole

    if options.out.exists():
        raise UserError(f"{options.out} exists already.", "Choose another --out.")
    manifests = [_newest(place) for place in options.places]
    for other in manifests[1:]:
        check_model(other, manifests[0].shapes)
    text = manifests[0].header["run"]
    options.out.mkdir(parents=True)
    write_whole(options.out / "run.toml", text)
    run = config.load(str(options.out / "run.toml"))
    save_first(run, _mean(manifests), options.out)
    tokenizer = Path(options.places[0]) / "tokenizer.json"
    if tokenizer.is_file():
        shutil.copyfile(tokenizer, options.out / "tokenizer.json")
    print(f"{options.out}: the mean of {len(manifests)} checkpoints' weights, at step 0")
    return 0


def _mean(manifests: list[Manifest]) -> Iterator[tuple[str, Tensor]]:
    from megagpt.checkpoint.load import reader_of

    readers = [reader_of(manifest) for manifest in manifests]
    for name in manifests[0].shapes:
        total = readers[0]("weight", name).double()
        for read in readers[1:]:
            total += read("weight", name)
        yield name, (total / len(readers)).float()


def _facts(manifest: Manifest) -> dict[str, Any]:
    header = manifest.header
    return {
        "folder": str(manifest.commit),
        "step": header["step"],
        "tokens": header["tokens"],
        "evaluation_loss": header.get("evaluation_loss"),
        "mesh": header.get("mesh"),
        "megagpt": header.get("megagpt"),
        "files": len(header["files"]),
        "bytes": sum(part["bytes"] for part in header["files"]),
    }


def _newest(place: str) -> Manifest:
    """The checkpoint at `place`, undamaged. Raises UserError if there is none."""
    from megagpt.checkpoint.load import fault_in_files, read_manifest

    commit = _commits(place)[0]
    manifest = read_manifest(commit)
    fault = fault_in_files(manifest)
    if fault:
        raise UserError(f"{fault}.", "megagpt checkpoint ls lists the others: name one of their folders.")
    return manifest


def _commits(place: str) -> list[Commit]:
    """The checkpoint whose folder `place` is, or those of the run, newest first. Raises UserError if there is none."""
    import re

    from megagpt.checkpoint.folders import checkpoints_of, folder_at
    from megagpt.checkpoint.lineage import MANIFEST, Commit, commits

    folder = folder_at(place)
    if folder.exists(MANIFEST):
        numbers = re.search(r"gen-(\d+)/step-(\d+)/?$", str(folder))
        generation, step = map(int, numbers.groups()) if numbers else (0, 0)
        return [Commit(generation, step, folder)]
    root = folder
    if folder.exists("run.toml"):
        root = checkpoints_of(config.load(str(Path(place) / "run.toml")).checkpoint, Path(place))
    found = list(commits(root))
    if not found:
        raise UserError(
            f"{place} is no checkpoint: it has neither {MANIFEST} nor checkpoints of a run.",
            "Name a run's folder, or one of its gen-*/step-* folders.",
        )
    return found
