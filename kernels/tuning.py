"""Tile shapes, looked up in tables that are part of the source: nothing is tuned while a model trains.

Ranks that tune for themselves may pick different tiles and so round differently; a table gives all ranks the same.
`tables/ARCHITECTURE.json` is written by `python -m benchmarks.tune` on a GPU. One that no GPU has confirmed says
"measured": null, and its tiles were chosen by what the compiler reports (`python -m megagpt.kernels.report`).
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megagpt.errors import UserError

TABLES = Path(__file__).parent / "tables"


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How one kernel is cut: what a program holds at once, its warps, and the loads it keeps in flight."""

    rows: int = 1
    columns: int = 1
    warps: int
    stages: int
    programs: int = 0
    """Programs of the whole grid, for kernels that walk over rows; 0 where the size of the input decides."""

    def options(self) -> dict[str, int | bool]:
        """The compiler's options. Fusing a * b + c is said outright, since Triton's default changes in 3.10."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def architecture(device: torch.device) -> str:
    """The table that a device reads. On a CPU, where only the interpreter runs kernels, that of sm90."""
    if device.type != "cuda":
        return "sm90"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8 and minor == 0:
        return "sm80"
    if major == 9:
        return "sm90"
    return "sm100" if major == 10 else "sm86"  # sm86, sm89 and sm120 have 99 KiB of shared memory and no wgmma


@functools.cache
def table(name: str) -> dict[str, Any]:
    """The whole table of an architecture."""
    return json.loads((TABLES / f"{name}.json").read_text(encoding="utf-8"))


def tile(kernel: str, dtype: torch.dtype, width: int, device: torch.device) -> Tile:
    """The tile of a kernel: the first entry of its dtype class that is wide enough. Raises ValueError if none is."""
    kind = "half" if dtype.itemsize == 2 else "float"
    for entry in table(architecture(device))["kernels"][kernel][kind]:
        if width <= entry["width"]:
            return Tile(**{key: value for key, value in entry.items() if key != "width"})
    raise ValueError(f"{kernel}: width {width:,} is over the widest that its table has for {dtype}.")


def digest(device: torch.device) -> str:
    """sha256 of the table that `device` reads: equal on all ranks, or their sums may round differently."""
    return hashlib.sha256((TABLES / f"{architecture(device)}.json").read_bytes()).hexdigest()


def check_ranks_agree(device: torch.device) -> None:
    """One small all-gather over all ranks. Raises UserError if a rank reads another table than this one does."""
    own = torch.frombuffer(bytearray.fromhex(digest(device)), dtype=torch.uint8).to(device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own)
    others = [rank for rank, table_digest in enumerate(every) if not torch.equal(table_digest, own)]
    if others:
        raise UserError(
            f"rank {dist.get_rank()} reads the kernel table {architecture(device)} with hash {digest(device)[:8]}, "
            f"but rank {others[0]} reads another.",
            "Use one kind of GPU and one version of megagpt on all nodes, or --model.kernels torch.",
        )
