"""`megagpt verify`: the options, and what it prints.

A table, a line a layout: the largest error of each kind as a share of its bound; and for a layout that fails the first
tensor that differs, by how much, on which rank, and what kind of fault it looks like.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from megagpt import config
from megagpt.checks import checked_layout
from megagpt.errors import UserError

KINDS = {"activation": "outputs", "loss": "loss", "gradient": "gradients", "norm": "norm", "weight": "weights"}
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Prove that layouts of a model compute the same: loss, every gradient, norm, and three steps of the optimizer.

    A shrunk model of the preset's structure is trained for three steps in fp64 on one rank, and then on each layout in
    local ranks, and everything is compared within the bound that rounding has.
    """

    preset: tyro.conf.Positional[str] = "gpt3-125m"
    """Preset or run.toml whose structure is tried."""
    layouts: str = ""
    """Layouts, with commas: data x pipeline x tensor, then /z0 to z3, /a1 ..., /sp, as in 2x2x2/z1/a3/sp. None: many."""
    world: int = 8
    """Ranks at most, when no layout is named."""
    inject: str = ""
    """Plant a fault, to see it caught: --inject list names them, all tries each."""
    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True)
class Result:
    """One layout's comparison."""

    layout: str
    seconds: float
    shares: dict[str, float]
    """Of each kind the largest error over its bound."""
    problem: str = ""
    kind: str = ""


def run_verify(options: Verify) -> int:
    """Try the layouts and print what they gave. Exit status 0 if all agree, else 1."""
    from megagpt.verify import faults
    from megagpt.verify.layouts import defaults, parse

    preset = config.load(options.preset)
    if options.inject == "list":
        for name, fault in faults.FAULTS.items():
            print(f"  {name:<26}{fault.summary}  ({fault.layout})")
        return 0
    if options.inject:
        return _try_faults(preset, list(faults.FAULTS) if options.inject == "all" else [options.inject], options)
    words = options.layouts.replace(",", " ").split()
    layouts = [parse(word) for word in words] or defaults(options.world)
    if not layouts:
        raise UserError(f"--world {options.world} leaves no layout to try.", "Use --world 2 or more, or name --layouts.")
    for layout in layouts:
        checked_layout(_run(preset, layout))
    results = []
    if not options.json:
        print(f"{options.preset}, shrunk: the largest error over its bound, by kind (1.00 is the bound)")
        print(_row("layout", [*KINDS.values(), "moments", "seconds"]))
    for layout in layouts:
        results.append(_try(_run(preset, layout), str(layout), fault=None))
        _say(results[-1], options)
    failed = [result for result in results if result.problem]
    if options.json:
        print(json.dumps({"preset": options.preset, "layouts": [vars(result) for result in results]}))
    else:
        print(f"{len(results) - len(failed)} of {len(results)} layouts agree with the fp64 reference.")
    return 1 if failed else 0


def _run(preset: config.Run, layout: Any) -> config.Run:
    from megagpt.verify.task import run_of

    return run_of(preset, layout)


def _try_faults(preset: config.Run, names: list[str], options: Verify) -> int:
    """Plant each fault where it can act. Exit status 1, as for any layout that fails, or 3 if one stays unnamed."""
    from megagpt.verify import faults
    from megagpt.verify.layouts import parse

    unnamed = []
    for name in names:
        fault = faults.named(name)
        for word in options.layouts.replace(",", " ").split() or [fault.layout]:
            layout = parse(word)
            result = _try(faults.fitting(_run(preset, layout), name), str(layout), fault=name)
            verdict = "caught and named" if result.kind == fault.kind else "NOT NAMED" if result.problem else "NOT CAUGHT"
            unnamed += [] if result.kind == fault.kind else [name]
            print(f"{name} ({fault.summary}): {verdict}")
            print(f"  {result.layout}: {result.problem or 'everything agrees'}")
            sys.stdout.flush()
    return 3 if unnamed else 1


def _try(run: config.Run, layout: str, *, fault: str | None) -> Result:
    """Compute the truth and the layout, and compare."""
    import torch

    from megagpt.parallel import ranks
    from megagpt.verify.compare import findings
    from megagpt.verify.diagnose import diagnose
    from megagpt.verify.measure import measure
    from megagpt.verify.reference import compute

    began = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # ranks are forked from this process, and a fork has no thread pool
    try:
        truth = compute(run)
    finally:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="megagpt-verify-") as name:
        folder = Path(name)
        status = ranks.run_local(lambda: measure(run, folder, fault), run.parallel.world_size())
        if status:
            return Result(layout, time.perf_counter() - began, {}, problem=f"a rank ended with status {status}")
        found = findings(run, truth, folder)
    shares = {name: max(item.error / item.bound for item in found if item.kind == kind) for kind, name in KINDS.items()}
    shares["moments"] = max(item.error / item.bound for item in found if item.kind in MOMENTS)
    diagnosis = diagnose(run, truth, found)
    if diagnosis is None:
        return Result(layout, time.perf_counter() - began, shares)
    first = diagnosis.finding
    worst = first.worst()
    where = f" on {worst.mesh.describe()}" if worst else f": {first.note}" if first.note else ""
    problem = (
        f"first to differ: {first.kind} {first.name}{where}, off by {first.error:.2g} where rounding explains "
        f"{first.bound:.2g}\n    looks like: {diagnosis.kind} ({diagnosis.words})"
    )
    return Result(layout, time.perf_counter() - began, shares, problem=problem, kind=diagnosis.kind)


def _say(result: Result, options: Verify) -> None:
    if options.json:
        return
    if result.shares:
        print(_row(result.layout, [*(f"{share:.2f}" for share in result.shares.values()), f"{result.seconds:.1f}"]))
    if result.problem:
        print(f"  FAILED {result.layout}: {result.problem}")
    sys.stdout.flush()


def _row(first: str, cells: list[str]) -> str:
    return f"  {first:<18}" + "".join(f"{cell:>10}" for cell in cells)
