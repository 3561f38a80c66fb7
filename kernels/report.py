"""What the compiler makes of every kernel and every entry of the tables, without a GPU, and whether it breaks a rule.

    python -m megagpt.kernels.report [--full] [--architecture sm90 ...] [--out FOLDER]

Rules, for half-precision inputs (fp32 runs on no tensor core and is there for tests and small models):
    spills        no register is spilled in a hot loop
    serialised    no tensor-core instruction waits for the one before it (Hopper; ptxas's C75xx)
    no tensor     matrix products use the tensor cores
    narrow loads  the hot loop has 16-byte global loads, and those under 4 bytes a lane move a tenth of it at most
    shared        shared memory is within the architecture's limit
    atomics       no global atomic, whose order could change a result
`WAIVED` names what is known to break one, and why. gfx942 is compiled, to show that it lowers, and not read.
Bound: the rate that a kernel cannot pass by its instructions alone. With tensor cores it is the share of their peak if
arithmetic, issue and exponentials overlap perfectly; without, the share of the memory's rate that its bytes in flight
sustain at 700 ns of latency (Little's law). It says what is impossible, not what will be reached.
Moved: the bytes that the launch of the case asks memory for, counted in Triton's interpreter, and how many times those
that it cannot do without (`traffic.py`). Norms read their weights once a row, from L2; those are in the figure.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from megagpt.kernels import tuning
from megagpt.kernels.cases import cases
from megagpt.kernels.resources import SHARED_LIMIT, TENSOR_CORE, Resources, compiling_for, read
from megagpt.kernels.visits import tiles_visited

NVIDIA = ("sm80", "sm86", "sm90", "sm100")
# (architecture, kernel, case) as regular expressions -> why the rule `spills` may be broken there.
WAIVED = {
    (
        r"sm\d+",
        "backward_.*|forward",
        r"attention 256.*",
    ): "256 features of two sums fill the registers; no preset is so wide",
    (r"sm\d+", "_backward", r"norm 16,?384.*"): "four spills at the widest width, of scalars",
}


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    case: str
    launch: int
    """Its place among the launches of the case."""
    resources: Resources
    broken: tuple[str, ...]
    waived: str


def broken_rules(case: str, found: Resources, dtype: torch.dtype) -> tuple[tuple[str, ...], str]:
    """(rules that a compiled kernel breaks, why that is waived or an empty string)."""
    broken = []
    if found.shared_bytes > SHARED_LIMIT[found.architecture]:
        broken.append("shared")
    if found.count("ATOM.", "ATOMG", "RED.", "REDG", "UTMAREDG", hot=False):
        broken.append("atomics")
    if dtype.itemsize == 2:
        has_products = found.kernel in PRODUCTS
        loads = found.loaded_bytes()
        products = found.count(TENSOR_CORE[found.architecture])
        if has_products and not products:
            broken.append("no tensor")
        if found.notes or (products and found.count("WARPGROUP") > products):
            broken.append("serialised")
        narrow = sum(width * number for width, number in loads.items() if width < 4)
        if max(loads, default=16) < 16 or 10 * narrow > sum(width * number for width, number in loads.items()):
            broken.append("narrow loads")
        if found.spills():
            broken.append("spills")
    for (architecture, kernel, name), why in WAIVED.items():
        matches = zip((architecture, kernel, name), (found.architecture, found.kernel, case), strict=True)
        if "spills" in broken and all(re.fullmatch(pattern, text) for pattern, text in matches):
            return tuple(rule for rule in broken if rule != "spills"), why
    return tuple(broken), ""


def measure(architecture: str, *, full: bool, dtype: torch.dtype) -> Iterator[Row]:
    """Compile all cases for an NVIDIA architecture; a kernel that two cases share appears once."""
    seen = set()
    for case, launch in cases(dtype, full=full):
        with compiling_for(architecture) as compiled:
            launch()
        for place, kernel in enumerate(compiled):
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                found = read(kernel, architecture)
                yield Row(case, place, found, *broken_rules(case, found, dtype))


PRODUCTS = {"forward": 2, "backward_keys": 4, "backward_queries": 3}  # matrix products of a tile


def operations(found: Resources) -> float:
    """Tensor-core operations of one pass of the hot loop; 0 for a kernel without."""
    if found.kernel not in PRODUCTS:
        return 0
    tile = found.constants
    return PRODUCTS[found.kernel] * 2 * tile["M"] * tile["C"] * tile["BLOCK_K"]


HEADER = (
    f"{'case':28} {'kernel':17} {'warps':>5} {'regs':>4} {'spill':>5} {'shared':>7} {'blocks':>6} {'instr':>5} "
    f"{'mma':>4} {'mufu':>4} {'16 B':>4} {'KB/SM':>5} {'bound':>6} {'moved MB':>8} {'times':>5}  rules"
)


def line(row: Row, moved: str) -> str:
    """A row of the table: `instr`, `mma`, `mufu` and `16 B` (wide loads) are of one pass of the hot loop."""
    found = row.resources
    verdict = ", ".join(row.broken).upper() or (f"spills waived: {row.waived}" if row.waived else "ok")
    wide = sum(number for width, number in found.loaded_bytes().items() if width >= 16)
    return (
        f"{row.case:28} {found.kernel:17} {found.warps:5} {found.registers:4} {found.spills():5} "
        f"{found.shared_bytes:7,} {found.blocks_per_sm():6} {found.steady_instructions():5} "
        f"{found.count(TENSOR_CORE[found.architecture]):4} {found.count('MUFU'):4} {wide:4} "
        f"{found.bytes_in_flight() / 1024:5.0f} {found.bound(operations(found)):6.0%} {moved}  {verdict}"
    )


def start_traffic(architecture: str, *, full: bool) -> subprocess.Popen[str]:
    """`traffic.py` in a process of its own: a process either interprets kernels or compiles them."""
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-W", "ignore", "-m", "megagpt.kernels.traffic", architecture, *(["--full"] if full else [])],
        env={**os.environ, "TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def moved(row: Row, traffic: dict[str, list[dict[str, Any]]]) -> str:
    """The two columns of what a launch moves. Raises KeyError if the interpreter ran another kernel in its place."""
    found = traffic[row.case][row.launch]
    if found["kernel"] != row.resources.kernel:
        raise KeyError(f"{row.case}: launch {row.launch} is {found['kernel']}, not {row.resources.kernel}")
    return f"{found['moved'] / 1e6:8.2f} {found['moved'] / found['least']:5.2f}"


# Layers whose visited tiles are printed: name, tokens, and what `tiles_visited` takes.
LAYERS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("2,048 tokens, causal", 2048, {}),
    ("2,048 tokens, band of 256", 2048, {"window": 256}),
    ("8,192 tokens, causal", 8192, {}),
    ("8,192 tokens, band of 256", 8192, {"window": 256}),
    ("8,192 tokens in 8 documents of 1,024", 8192, {"lengths": [1024] * 8}),
    ("8,192 tokens, both sides", 8192, {"causal": False}),
)


def visits(architecture: str) -> Iterator[str]:
    """Lines on how many tiles the forward of 128 features visits in one head, of all there are."""
    with compiling_for(architecture):
        cut = tuning.tile("attention_forward", torch.bfloat16, 128, torch.device("cpu"))
    yield f"tiles of {cut.rows} x {cut.columns} that attention visits"
    for name, T, options in LAYERS:
        visited = tiles_visited(T, rows=cut.rows, columns=cut.columns, **options)
        dense = (T // cut.rows) * (T // cut.columns)
        window = options.get("window")
        limit = f", at most {(window + cut.rows) / T:.1%} by (W + one tile) / T" if window else ""
        yield f"  {name:38} {visited:5,} of {dense:5,}  {visited / dense:6.1%}{limit}"


def main(arguments: list[str] | None = None) -> int:
    """Print the report; the exit status is 1 if a rule is broken."""
    parser = argparse.ArgumentParser(
        prog="python -m megagpt.kernels.report", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--full", action="store_true", help="every table entry, on every architecture")
    parser.add_argument("--architecture", nargs="+", choices=(*NVIDIA, "gfx942"), help="instead of sm90, or of all")
    parser.add_argument("--out", type=Path, help="folder to write the table to, as text, one file a Triton version")
    options = parser.parse_args(arguments)
    lines: list[str] = []
    failures = 0

    def say(text: str) -> None:
        lines.append(text)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    say(f"Triton {triton.__version__}, bf16")
    for architecture in options.architecture or ((*NVIDIA, "gfx942") if options.full else ("sm90",)):
        say(f"\n{architecture}: tiles measured on a GPU: {json.dumps(tuning.table(architecture)['measured'])}")
        if architecture == "gfx942":
            say(f"{_lowered(architecture)} kernels lower to AMD code; none was ever run")
            continue
        counting = start_traffic(architecture, full=options.full)
        for text in visits(architecture):
            say(text)
        rows = list(measure(architecture, full=options.full, dtype=torch.bfloat16))
        traffic = json.loads(counting.communicate()[0])
        say(HEADER)
        for row in rows:
            say(line(row, moved(row, traffic)))
            failures += bool(row.broken)
        if options.full:  # fp32 has no rules but shared memory and atomics
            rows = list(measure(architecture, full=False, dtype=torch.float32))
            for row in rows:
                if row.broken:
                    say(f"fp32 {line(row, '')}")
                    failures += 1
            say(f"{len(rows)} kernels in fp32")
    say(f"\n{failures} kernels break a rule" if failures else "\nno kernel breaks a rule")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        text = "\n".join(lines) + "\n"
        (options.out / f"kernels_triton_{triton.__version__}.txt").write_text(text, encoding="utf-8")
    return 1 if failures else 0


def _lowered(architecture: str) -> int:
    """How many kernels of the short report compile for an architecture whose code is not read."""
    with compiling_for(architecture) as compiled:
        for _, launch in cases(torch.bfloat16, full=False):
            launch()
    return len(compiled)


if __name__ == "__main__":
    sys.exit(main())
