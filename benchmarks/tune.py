# pyright: reportCallIssue=false
"""Choose the tiles of this GPU's table by time, and write the table that training then reads.

    python -m benchmarks.tune [--kernels attention_forward norm_backward ...] [--check]

For each kernel, dtype class and width the candidates run one after another on sizes of real training; the fastest
wins, and the table says on which GPU, when and with which Triton. Nothing is tuned while a model trains: all ranks
read the file. `--check` runs two candidates of each on small sizes and writes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple
from datetime import date
from typing import Any, cast
from unittest import mock

import torch
import triton
from triton.runtime.errors import OutOfResources, PTXASError

from megagpt.kernels import attention, cross_entropy, gelu, norm, residual, rotary, swiglu, tuning
from megagpt.kernels.tuning import TABLES, Tile
from megagpt.ops import Mask

DTYPES = {"half": torch.bfloat16, "float": torch.float32}
MODULES = (attention, cross_entropy, gelu, norm, residual, rotary, swiglu)


def candidates(kernel: str, current: Tile) -> Iterator[Tile]:
    """The table's own tile first, then its neighbours, which differ in at most two numbers: half or double, or other
    warps and stages. All combinations would take a GPU hours to compile, most of them for tiles far from any good one.
    """
    yield current
    attends = kernel.startswith("attention") and kernel != "attention_delta"
    rows = (current.rows // 2, current.rows, current.rows * 2)
    columns = (
        (current.columns // 2, current.columns, current.columns * 2) if current.columns > 1 else (current.columns,)
    )
    programs = (current.programs // 2, current.programs, current.programs * 2) if current.programs else (0,)
    for numbers in itertools.product(rows, columns, (4, 8, 16), (1, 2, 3), programs):
        found = Tile(**dict(zip(("rows", "columns", "warps", "stages", "programs"), numbers, strict=True)))
        smallest = 16 if attends else 1
        numbers_changed = sum(one != other for one, other in zip(astuple(found), astuple(current), strict=True))
        if 1 <= numbers_changed <= 2 and found.rows >= smallest and found.columns >= min(smallest, current.columns):
            yield found


def workload(kernel: str, dtype: torch.dtype, width: int, *, small: bool) -> Callable[[], object]:
    """What launches a kernel on a real size, forward and backward."""
    T = 256 if small else 4096

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()

    mask = Mask(0.1, 12_345, torch.zeros(1, dtype=torch.int64, device="cuda"))
    if kernel.startswith("attention"):
        heads = max(1, 2048 // width)
        inputs = [random(1, T, heads, width) for _ in range(3)]
        run = lambda: attention.attention(*inputs, dropout=mask if "dropout" in kernel else None)  # noqa: E731
    elif kernel.startswith("norm"):
        inputs = [random(1, T, width), random(1, T, width), random(width), random(width)]
        run = lambda: norm.add_layernorm(*inputs)[0]  # noqa: E731
    elif kernel.startswith("cross_entropy"):
        inputs, targets = [random(T, 50_304)], torch.zeros(T, dtype=torch.int64, device="cuda")
        run = lambda: cross_entropy.cross_entropy(inputs[0], targets, vocabulary=50_257)  # noqa: E731
    elif kernel == "rotary":
        inputs, places = [random(1, T, 16, 128), random(1, T, 16, 128)], torch.arange(T, device="cuda")
        run = lambda: torch.stack(rotary.rotary(*inputs, places, 1e4))  # noqa: E731
    else:
        inputs = [random(1, T, 8192), random(8192)]
        run = {
            "gelu": lambda: gelu.gelu(*inputs),
            "swiglu": lambda: swiglu.swiglu(inputs[0]),
            "residual": lambda: residual.add_residual(inputs[0], inputs[0], b_D=inputs[1], mask=mask),
        }[kernel.split("_")[0]]
    if not kernel.endswith(
        ("backward", "backward_dropout", "keys", "queries", "keys_dropout", "queries_dropout", "delta")
    ):
        return lambda: run().detach()
    out = run()
    upstream = torch.randn_like(out)
    leaves = [leaf for leaf in inputs if kernel != "swiglu_backward" or leaf is inputs[0]]
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)


def fastest(kernel: str, dtype: torch.dtype, entry: dict[str, Any], *, check: bool) -> tuple[dict[str, Any], float]:
    """The best of an entry's candidates, and how many times faster than the entry it is."""
    current = Tile(**{key: value for key, value in entry.items() if key != "width"})
    original = tuning.tile
    run = workload(kernel, dtype, entry["width"] if entry["width"] > 1 else 128, small=check)
    best, best_time, first_time = current, float("inf"), float("inf")
    for number, cut in enumerate(candidates(kernel, current)):
        if check and number == 2:
            break
        patched = lambda name, *rest, cut=cut: cut if name == kernel else original(name, *rest)  # noqa: E731
        with mock.patch.multiple("megagpt.kernels.tuning", tile=patched):
            patches = [mock.patch.object(module, "tile", patched) for module in MODULES]
            try:
                for patch in patches:
                    patch.start()
                milliseconds = cast(float, triton.testing.do_bench(run, warmup=10, rep=40, return_mode="median"))
            except (OutOfResources, PTXASError, triton.CompilationError) as error:
                if cut == current:
                    raise RuntimeError(f"{kernel}: the table's own tile {cut} does not run on this GPU") from error
                continue
            finally:
                for patch in patches:
                    patch.stop()
        first_time = milliseconds if cut == current else first_time
        if milliseconds < best_time:
            best, best_time = cut, milliseconds
    numbers = {key: value for key, value in dataclasses.asdict(best).items() if key != "programs" or value}
    return {"width": entry["width"], **numbers}, first_time / best_time


def write(name: str, found: dict[str, Any]) -> None:
    """The table as JSON with one entry a line, so that a change of one tile is a change of one line."""
    lines = ["{", f'  "measured": {json.dumps(found["measured"])},', '  "kernels": {']
    for kernel, kinds in found["kernels"].items():
        lines.append(f'    "{kernel}": {{')
        for kind, entries in kinds.items():
            lines += [
                f'      "{kind}": [',
                ",\n".join(f"        {json.dumps(entry)}" for entry in entries),
                "      ],",
            ]
        lines[-1] = lines[-1].rstrip(",")
        lines.append("    },")
    lines[-1] = lines[-1].rstrip(",")
    (TABLES / f"{name}.json").write_text("\n".join([*lines, "  }", "}", ""]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernels", nargs="+", help="only these; default all")
    parser.add_argument("--check", action="store_true", help="two candidates of each on small sizes; write nothing")
    options = parser.parse_args()
    device = torch.device("cuda")
    name = tuning.architecture(device)
    found = json.loads(json.dumps(tuning.table(name)))
    for kernel, kinds in found["kernels"].items():
        if kernel == "sum_partials" or (options.kernels and kernel not in options.kernels):
            continue
        for kind, entries in kinds.items():
            for number, entry in enumerate(entries):
                entries[number], gain = fastest(kernel, DTYPES[kind], entry, check=options.check)
                sys.stdout.write(f"{kernel} {kind} {entry['width']}: {entries[number]}, {gain:.2f} x\n")
    if not options.check:
        gpu = torch.cuda.get_device_name()
        found["measured"] = {"gpu": gpu, "date": date.today().isoformat(), "triton": triton.__version__}
        write(name, found)


if __name__ == "__main__":
    main()
