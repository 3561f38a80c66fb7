"""Our norms and cross entropy beside Liger-Kernel's, compiled for an H100 by the same compiler in the same run.

No GPU runs anything: what is compared is what the compiler reports. Needs liger-kernel beside Triton.

    python -m benchmarks.kernels_static [--out benchmarks/results/kernels_static.json]

Columns: registers a thread; spills in all of the code; programs that one SM holds at once (of a grid with one program
an SM, one); KB that an SM has asked for at once, where 18 cover an H100's latency; passes over the large matrices.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from liger_kernel.ops import cross_entropy as liger_loss  # pyright: ignore[reportMissingImports]
from liger_kernel.ops import layer_norm as liger_norm  # pyright: ignore[reportMissingImports]
from torch import Tensor

from megagpt.kernels import cross_entropy, norm
from megagpt.kernels.resources import compiling_for, read

ROWS, VOCABULARY = 256, 50_304
# Why a figure of ours is the worse one of a pair. What a rate depends on is bytes in flight and passes; registers only
# matter where they keep programs off the SM or spill.
WHY = {
    ("layernorm forward", 768): "four rows a program hold more registers and as many bytes in flight",
    ("layernorm forward", 4096): "half as many warps a row hold more registers and twice the bytes in flight",
    ("layernorm backward", 768): "four rows a step, two steps in flight: many registers for eight times the bytes",
    ("layernorm backward", 4096): "two steps in flight: more registers for three times the bytes",
    (
        "cross entropy forward",
        VOCABULARY,
    ): "two blocks of each row in flight, twice what an H100 needs, in fewer registers",
}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One compiled kernel."""

    what: str
    width: int
    whose: str
    warps: int
    registers: int
    spills: int
    programs_per_sm: int
    kib_in_flight: float
    passes: int


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def our_norm(width: int) -> None:
    x, w, b = (zeros(*shape).requires_grad_() for shape in ((ROWS, width), (width,), (width,)))
    norm.layernorm(x, w, b).backward(zeros(ROWS, width))


def ligers_norm(width: int) -> None:
    x, w, b = zeros(ROWS, width), zeros(width), zeros(width)
    _, _, mean, rstd, *_ = liger_norm.layer_norm_forward(x, w, b, 1e-5)
    liger_norm.layer_norm_backward(zeros(ROWS, width), x, w, b, mean, rstd)


def our_loss(width: int) -> None:
    logits = zeros(ROWS, width).requires_grad_()
    cross_entropy.cross_entropy(logits, torch.zeros(ROWS, dtype=torch.int64), vocabulary=width).sum().backward()


def ligers_loss(width: int) -> None:
    logits = zeros(ROWS, width).requires_grad_()
    liger_loss.cross_entropy_forward(
        logits, torch.zeros(ROWS, dtype=torch.int64), None, -100, 0.0, 0.0, "none", None, return_z_loss=False
    )


def figures(what: str, width: int, whose: str, launch: Callable[[int], None], passes: dict[str, int]) -> list[Figures]:
    """Compile what `launch` launches; `passes` has the kernels that count, by a part of their name."""
    with compiling_for("sm90") as compiled:
        launch(width)
    found = []
    for kernel in compiled:
        resources = read(kernel, "sm90")
        for part, count in passes.items():
            if part not in resources.kernel:
                continue
            one_an_sm = whose == "Liger" and part == "backward"  # its grid is the number of SMs
            resident = 1 if one_an_sm else resources.blocks_per_sm()
            in_flight = resources.bytes_in_flight() / resources.blocks_per_sm() * resident
            found.append(
                Figures(
                    what=f"{what} {'backward' if 'backward' in part else 'forward'}",
                    width=width,
                    whose=whose,
                    warps=resources.warps,
                    registers=resources.registers,
                    spills=resources.spills(hot=False),
                    programs_per_sm=resident,
                    kib_in_flight=round(in_flight / 1024, 1),
                    passes=count,
                )
            )
    return found


def measure() -> list[Figures]:
    rows = []
    for width in (768, 4096, 12_288):
        rows += figures("layernorm", width, "megagpt", our_norm, {"_forward": 2, "_backward": 3})
        rows += figures("layernorm", width, "Liger", ligers_norm, {"forward": 2, "backward": 3})
    rows += figures("cross entropy", VOCABULARY, "megagpt", our_loss, {"_forward": 1, "_backward": 2})
    rows += figures("cross entropy", VOCABULARY, "Liger", ligers_loss, {"cross_entropy": 3})
    return rows


def is_worse(ours: Figures, rows: list[Figures]) -> bool:
    """Whether Liger's kernel of the same task has a better figure in any column."""
    peers = [row for row in rows if row.whose == "Liger" and (row.what, row.width) == (ours.what, ours.width)]
    return any(
        ours.registers > peer.registers
        or ours.spills > peer.spills
        or ours.kib_in_flight < peer.kib_in_flight
        or ours.passes > peer.passes
        for peer in peers
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    rows = measure()
    for row in sorted(rows, key=lambda row: (row.what, row.width)):
        sys.stdout.write(
            f"{row.what:24} {row.width:6,} {row.whose:8} warps {row.warps:2}  registers {row.registers:3}  "
            f"spills {row.spills:3}  programs {row.programs_per_sm:2}  KiB in flight {row.kib_in_flight:6.1f}  "
            f"passes {row.passes}\n"
        )
    worse = sorted({(row.what, row.width) for row in rows if row.whose == "megagpt" and is_worse(row, rows)})
    sys.stdout.writelines(f"worse, {what} {width:,}: {WHY[what, width]}\n" for what, width in worse)
    if options.out:
        result: dict[str, Any] = {
            "command": "python -m benchmarks.kernels_static", "date": date.today().isoformat(),
            "versions": {name: version(name) for name in ("torch", "triton", "liger-kernel")},
            "python": platform.python_version(), "compiled_for": "sm_90, nothing ran",
            "rows": [asdict(row) for row in rows],
        }  # fmt: skip
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
