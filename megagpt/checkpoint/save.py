"""Write a checkpoint: every rank its own part, then one manifest, which is the commit.

    step-000000060/rank-00000.safetensors    the boxes of weight, exp_avg and exp_avg_sq that rank 0 owns, in fp32
    step-000000060/rank-00000.json           which boxes those are, their checksums, and the file's size and hash
    step-000000060/manifest.json             all of these together with the run's state; written last

Each file appears whole or not at all (`folders`). When all ranks have written theirs, rank 0 proves that boxes tile
every tensor exactly, and writes the manifest. A folder without a manifest is not a checkpoint. No pickle.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from megagpt.checkpoint import boxes, proof
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
    failure = together(lambda: write_part(folder, owned, rank), rank, ranks)
    if failure is None:
        failure = together(lambda: commit(folder, header, ranks) if rank == 0 else None, rank, ranks)
    if failure is not None:
        raise not_written(folder, failure)


def not_written(folder: Folder, failure: str) -> UserError:
    return UserError(f"checkpoint {folder} was not written: {failure}.", "Older checkpoints are untouched.")


def together(work: Callable[[], Any], rank: int, ranks: int) -> str | None:
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
    folder.require_space(bytes_of(owned) + 2**20)
    with ThreadPoolExecutor(1, thread_name_prefix="proof") as pool:
        checksums = pool.submit(_checksums, owned)
        part = write_tensors(folder, rank, owned)
        description = {**part, "checksums": checksums.result()}
    folder.write(description_of(rank), [json.dumps(description).encode()])


def bytes_of(owned: Sequence[Slice]) -> int:
    """What the tensors of `owned` take in a file."""
    return sum(part.weight.numel() for part in owned) * 4 * len(KINDS)


def write_tensors(folder: Folder, rank: int, owned: Sequence[Slice]) -> dict[str, Any]:
    """Write a rank's file of slices; returns what a manifest says about it. Raises OSError if it fails."""
    file, digest = f"rank-{rank:05d}.safetensors", Hash()
    folder.write(file, hashed(file_chunks(tensors_of(owned)), digest))
    return {"file": file, "bytes": folder.size(file), "xxh3_128": digest.hexdigest(), "boxes": index_of(owned)}


def tensors_of(owned: Sequence[Slice]) -> list[tuple[str, Tensor]]:
    """The tensors of a file of slices by their names in it, in order."""
    return [(_key(kind, part, at), getattr(part, kind)) for at, part in enumerate(owned) for kind in KINDS]


def index_of(owned: Sequence[Slice]) -> list[dict[str, Any]]:
    """Which boxes those are."""
    return [
        {
            "tensor": part.name,
            "shape": list(part.shape),
            "start": list(part.box.start),
            "size": list(part.box.size),
            "keys": {kind: _key(kind, part, at) for kind in KINDS},
        }
        for at, part in enumerate(owned)
    ]


def _key(kind: str, part: Slice, at: int) -> str:
    return f"{kind}/{part.name}/{at}"


def _checksums(owned: Sequence[Slice]) -> dict[str, list[int]]:
    """Parameter -> what this rank's boxes add to the checksum of each kind."""
    found: dict[str, list[int]] = defaultdict(lambda: [0] * len(KINDS))
    for part in owned:
        for at, kind in enumerate(KINDS):
            found[part.name][at] += proof.of_box(getattr(part, kind), part.shape, part.box)
    return found


def commit(folder: Folder, header: dict[str, Any], ranks: int) -> None:
    """Prove that the parts of all ranks are the whole state, and write the manifest. One rank does it."""
    parts = [json.loads(folder.read(description_of(rank))) for rank in range(ranks)]
    shapes: dict[str, tuple[int, ...]] = {}
    stored: dict[str, list[boxes.Box]] = defaultdict(list)
    sums: dict[str, list[int]] = defaultdict(lambda: [0] * len(KINDS))
    for part in parts:
        for name, values in part.pop("checksums").items():
            sums[name] = [a + b for a, b in zip(sums[name], values, strict=True)]
        for box in part["boxes"]:
            shapes[box["tensor"]] = tuple(box["shape"])
            stored[box["tensor"]].append(boxes.Box(tuple(box["start"]), tuple(box["size"])))
    for name, shape in shapes.items():
        fault = boxes.fault_in_tiling(shape, stored[name])
        assert fault is None, f"{name}: {fault}"
    checksums = {
        name: {kind: f"{value % 2**64:016x}" for kind, value in zip(KINDS, values, strict=True)}
        for name, values in sums.items()
    }
    manifest = {"format_version": FORMAT_VERSION, **header, "checksums": checksums, "files": parts}
    folder.write(MANIFEST, [sealed(manifest)])
    for rank in range(ranks):
        folder.delete_file(description_of(rank))


def description_of(rank: int) -> str:
    return f"rank-{rank:05d}.json"
