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
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from megagpt.kernels import attention, cross_entropy, gelu, norm, residual, rotary, swiglu, tuning
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
class Mask:
    """A dropout mask to compile for."""

    rate: float
    key: int
    samples_B: Tensor
    first_token: int = 0

    def keep_BNTC(self, heads: int, tokens: int, columns: int) -> Tensor:
        return torch.ones(len(self.samples_B), heads, tokens, columns, dtype=torch.bool)


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    case: str
    resources: Resources
    broken: tuple[str, ...]
    waived: str


def _mask() -> Mask:
    return Mask(0.1, 0x1234_5678_9ABC_DEF0, torch.zeros(1, dtype=torch.int64))


def _zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def _attention(width: int, dtype: torch.dtype, *, heads: int = 8, **options: Any) -> None:
    qkv = _zeros(1, 256, heads + 4, width, dtype=dtype)
    q, k, v = qkv.split((heads, 2, 2), 2)
    o = attention.attention(q, k, v, **options)
    o.backward(torch.zeros_like(o))


def _norm(width: int, dtype: torch.dtype, *, mask: Mask | None = None) -> None:
    x, residual_BTD = _zeros(1, 256, width, dtype=dtype), torch.zeros(1, 256, width, dtype=dtype)
    w, b = _zeros(width, dtype=dtype), _zeros(width, dtype=dtype)
    y, h = norm.add_layernorm(x, residual_BTD, w, b, mask=mask)
    (y + h).backward(torch.zeros_like(y))


def _rms(width: int, dtype: torch.dtype) -> None:
    y = norm.rmsnorm(_zeros(256, width, dtype=dtype), _zeros(width, dtype=dtype))
    y.backward(torch.zeros_like(y))


def _loss(dtype: torch.dtype, smoothing: float) -> None:
    logits, targets = _zeros(16, 50_304, dtype=dtype), torch.zeros(16, dtype=torch.int64)
    cross_entropy.cross_entropy(logits, targets, vocabulary=50_257, smoothing=smoothing).sum().backward()


def _elementwise(dtype: torch.dtype) -> None:
    x, b = _zeros(1, 256, 1024, dtype=dtype), _zeros(1024, dtype=dtype)
    grad = torch.zeros_like(x)
    for y in (gelu.gelu(x, b), gelu.gelu(x), residual.add_residual(x, grad, b_D=b, mask=_mask())):
        y.backward(grad)
    residual.dropout(x, _mask()).backward(grad)
    y = swiglu.swiglu(x)
    y.backward(torch.zeros_like(y))
    q, k = rotary.rotary(
        _zeros(1, 256, 16, 128, dtype=dtype), _zeros(1, 256, 4, 128, dtype=dtype), torch.arange(256), 1e4
    )
    torch.autograd.backward((q, k), (torch.zeros_like(q), torch.zeros_like(k)))


def cases(dtype: torch.dtype, *, full: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, what launches its kernels). The full report has every width of the tables and every fusion."""
    start = torch.zeros(1, 256, dtype=torch.int32)
    yield "attention 64", lambda: _attention(64, dtype)
    yield "attention 128", lambda: _attention(128, dtype)
    yield "norm 4,096", lambda: _norm(4096, dtype)
    yield "cross entropy", lambda: _loss(dtype, 0.0)
    if not full:
        return
    for width in (16, 32, 80, 96, 256):
        yield f"attention {width}", lambda width=width: _attention(width, dtype)
    for width in (64, 128, 256):
        yield f"attention {width} dropout", lambda width=width: _attention(width, dtype, dropout=_mask())
    yield "attention 128 documents", lambda: _attention(128, dtype, document_start_BT=start, window=128)
    yield "attention 128 full documents", lambda: _attention(128, dtype, document_start_BT=start, causal=False)
    yield "attention 128 softcap", lambda: _attention(128, dtype, softcap=30.0)
    for width in (768, 2048, 5120, 8192, 12_288, 16_384):
        yield f"norm {width:,}", lambda width=width: _norm(width, dtype)
    for width in (64, 128, 4096, 12_288):
        yield f"rmsnorm {width:,}", lambda width=width: _rms(width, dtype)
    yield "norm 1,024 dropout", lambda: _norm(1024, dtype, mask=_mask())
    yield "cross entropy smoothed", lambda: _loss(dtype, 0.1)
    yield "elementwise", lambda: _elementwise(dtype)


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
        for kernel in compiled:
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                found = read(kernel, architecture)
                yield Row(case, found, *broken_rules(case, found, dtype))


PRODUCTS = {"forward": 2, "backward_keys": 4, "backward_queries": 3}  # matrix products of a tile


def operations(found: Resources) -> float:
    """Tensor-core operations of one pass of the hot loop; 0 for a kernel without."""
    if found.kernel not in PRODUCTS:
        return 0
    tile = found.constants
    return PRODUCTS[found.kernel] * 2 * tile["M"] * tile["C"] * tile["BLOCK_K"]


HEADER = (
    f"{'case':28} {'kernel':17} {'warps':>5} {'regs':>4} {'spill':>5} {'shared':>7} {'blocks':>6} {'instr':>5} "
    f"{'mma':>4} {'mufu':>4} {'16 B':>4} {'KB/SM':>5} {'bound':>6}  rules"
)


def line(row: Row) -> str:
    """A row of the table: `instr`, `mma`, `mufu` and `16 B` (wide loads) are of one pass of the hot loop."""
    found = row.resources
    verdict = ", ".join(row.broken).upper() or (f"spills waived: {row.waived}" if row.waived else "ok")
    wide = sum(number for width, number in found.loaded_bytes().items() if width >= 16)
    return (
        f"{row.case:28} {found.kernel:17} {found.warps:5} {found.registers:4} {found.spills():5} "
        f"{found.shared_bytes:7,} {found.blocks_per_sm():6} {found.steady_instructions():5} "
        f"{found.count(TENSOR_CORE[found.architecture]):4} {found.count('MUFU'):4} {wide:4} "
        f"{found.bytes_in_flight() / 1024:5.0f} {found.bound(operations(found)):6.0%}  {verdict}"
    )


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
        for text in visits(architecture):
            say(text)
        say(HEADER)
        for row in measure(architecture, full=options.full, dtype=torch.bfloat16):
            say(line(row))
            failures += bool(row.broken)
        if options.full:  # fp32 has no rules but shared memory and atomics
            rows = list(measure(architecture, full=False, dtype=torch.float32))
            for row in rows:
                if row.broken:
                    say(f"fp32 {line(row)}")
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
