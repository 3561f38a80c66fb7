"""Write a checkpoint: every rank its own part, then one manifest, which is the commit.

    step-000000060/rank-00000.safetensors    the boxes of weight, exp_avg and exp_avg_sq that rank 0 owns, in fp32
    step-000000060/rank-00000.json           which boxes those are, and the file's size and SHA-256
    step-000000060/manifest.json             all of these together with the run's state; written last

A rank writes to temporary names, syncs and renames. When all have done so, rank 0 proves that the boxes tile every
tensor exactly, and writes the manifest in the same way. A folder without a manifest is not a checkpoint. No pickle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from megagpt.checkpoint import boxes
from megagpt.checkpoint.lineage import MANIFEST
from megagpt.errors import UserError
from megagpt.files import require_space, sha256, sync_folder, whole, write_whole
from megagpt.parallel.ranks import lowest_over_ranks
from megagpt.parallel.state import Slice

FORMAT_VERSION = 1
KINDS = ("weight", "exp_avg", "exp_avg_sq")


def save(folder: Path, owned: Sequence[Slice], *, header: dict[str, Any], rank: int, ranks: int) -> None:
    """Commit this rank's `owned` slices, with all other ranks', as the checkpoint `folder`. Every rank must call it.

    `header` (the same on every rank, JSON types) is what else the run needs to continue. Raises UserError on all ranks
    if one of them could not write; the folder is then no checkpoint, and the ones before it are untouched.
    """
    failure = _together(lambda: _write_part(folder, owned, rank), rank, ranks)
    if failure is None:
        failure = _together(lambda: _commit(folder, header, ranks) if rank == 0 else None, rank, ranks)
    if failure is not None:
        raise UserError(f"checkpoint {folder} was not written: {failure}.", "Older checkpoints are untouched.")


def _together(work: Callable[[], None], rank: int, ranks: int) -> str | None:
    """Do `work` on every rank; the first failure's words on the rank that failed, and its number on the others."""
    problem: Exception | None = None
    try:
        work()
    except (OSError, UserError) as error:
        problem = error
    failed = lowest_over_ranks(rank if problem else ranks)
    if failed == ranks:
        return None
    return str(problem) if problem else f"rank {failed} failed, see its message"


def _write_part(folder: Path, owned: Sequence[Slice], rank: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    size = sum(part.weight.numel() for part in owned) * 4 * len(KINDS)
    require_space(folder, size + 2**20, "a checkpoint")
    tensors, index = {}, []
    for number, part in enumerate(owned):
        keys = {kind: f"{kind}/{part.name}/{number}" for kind in KINDS}
        for kind, key in keys.items():
            tensors[key] = getattr(part, kind).detach().to("cpu", torch.float32).contiguous()
        index.append(
            {"tensor": part.name, "shape": part.shape, "start": part.box.start, "size": part.box.size, "keys": keys}
        )
    path = folder / f"rank-{rank:05d}.safetensors"
    with whole(path) as temporary:
        safetensors.torch.save_file(tensors, temporary)
        description = {"file": path.name, "bytes": temporary.stat().st_size, "sha256": sha256(temporary)}
    write_whole(path.with_suffix(".json"), json.dumps({**description, "boxes": index}))


def _commit(folder: Path, header: dict[str, Any], ranks: int) -> None:
    parts = [json.loads((folder / f"rank-{rank:05d}.json").read_text()) for rank in range(ranks)]
    shapes = {box["tensor"]: tuple(box["shape"]) for part in parts for box in part["boxes"]}
    for name, shape in shapes.items():
        stored = [
            boxes.Box(tuple(box["start"]), tuple(box["size"]))
            for part in parts
            for box in part["boxes"]
            if box["tensor"] == name
        ]
        fault = boxes.fault_in_tiling(shape, stored)
        assert fault is None, f"{name}: {fault}"
    manifest = {"format_version": FORMAT_VERSION, **header, "files": parts}
    write_whole(folder / MANIFEST, json.dumps(manifest))
    sync_folder(folder.parent)
    for rank in range(ranks):
        (folder / f"rank-{rank:05d}.json").unlink()
