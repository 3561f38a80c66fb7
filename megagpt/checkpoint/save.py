"""Write a checkpoint: every rank its own part, then one manifest, which is the commit.

    step-000000060/rank-00000.safetensors    the boxes of weight, exp_avg and exp_avg_sq that rank 0 owns, in fp32
    step-000000060/rank-00000.json           which boxes those are, and the file's size and hash
    step-000000060/manifest.json             all of these together with the run's state; written last

Each file appears whole or not at all (`folders`). When all ranks have written theirs, rank 0 proves that boxes tile
every tensor exactly, and writes the manifest. A folder without a manifest is not a checkpoint. No pickle.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from megagpt.checkpoint import boxes
from megagpt.checkpoint.folders import Folder, sealed
from megagpt.checkpoint.lineage import MANIFEST
from megagpt.checkpoint.tensors import Hash, file_chunks, hashed
from megagpt.errors import UserError
from megagpt.parallel.ranks import lowest_over_ranks
from megagpt.parallel.state import Slice

FORMAT_VERSION = 2
KINDS = ("weight", "exp_avg", "exp_avg_sq")


def save(folder: Folder, owned: Sequence[Slice], *, header: dict[str, Any], rank: int, ranks: int) -> None:
    """Commit this rank's `owned` slices, with all other ranks', as the checkpoint `folder`. Every rank must call it.

    `header` (the same on every rank, JSON types) is what else the run needs to continue. Raises UserError on all ranks
    if one of them could not write; the folder is then no checkpoint, and the ones before it are untouched.
    """
    failure = _together(lambda: write_part(folder, owned, rank), rank, ranks)
    if failure is None:
        failure = _together(lambda: commit(folder, header, ranks) if rank == 0 else None, rank, ranks)
    if failure is not None:
        raise not_written(folder, failure)


def not_written(folder: Folder, failure: str) -> UserError:
    return UserError(f"checkpoint {folder} was not written: {failure}.", "Older checkpoints are untouched.")


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


def write_part(folder: Folder, owned: Sequence[Slice], rank: int) -> None:
    """Write a rank's file and its description. Raises UserError if there is no room for it, OSError if it fails."""
    size = sum(part.weight.numel() for part in owned) * 4 * len(KINDS)
    folder.require_space(size + 2**20)
    tensors, index = [], []
    for number, part in enumerate(owned):
        keys = {kind: f"{kind}/{part.name}/{number}" for kind in KINDS}
        tensors += [(key, getattr(part, kind)) for kind, key in keys.items()]
        index.append(
            {"tensor": part.name, "shape": part.shape, "start": part.box.start, "size": part.box.size, "keys": keys}
        )
    name, digest = f"rank-{rank:05d}.safetensors", Hash()
    folder.write(name, hashed(file_chunks(tensors), digest))
    description = {"file": name, "bytes": folder.size(name), "xxh3_128": digest.hexdigest(), "boxes": index}
    folder.write(_description(rank), [json.dumps(description).encode()])


def commit(folder: Folder, header: dict[str, Any], ranks: int) -> None:
    """Prove that the parts of all ranks are the whole state, and write the manifest. One rank does it."""
    parts = [json.loads(folder.read(_description(rank))) for rank in range(ranks)]
    shapes: dict[str, tuple[int, ...]] = {}
    stored: dict[str, list[boxes.Box]] = defaultdict(list)
    for part in parts:
        for box in part["boxes"]:
            shapes[box["tensor"]] = tuple(box["shape"])
            stored[box["tensor"]].append(boxes.Box(tuple(box["start"]), tuple(box["size"])))
    for name, shape in shapes.items():
        fault = boxes.fault_in_tiling(shape, stored[name])
        assert fault is None, f"{name}: {fault}"
    manifest = {"format_version": FORMAT_VERSION, **header, "files": parts}
    folder.write(MANIFEST, [sealed(manifest)])
    for rank in range(ranks):
        folder.delete_file(_description(rank))


def _description(rank: int) -> str:
    return f"rank-{rank:05d}.json"
