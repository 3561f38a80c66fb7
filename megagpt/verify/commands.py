"""`megagpt verify`: the options, and what it prints.

A table, a line a layout: the largest error of each kind as a share of its bound; and for a layout that fails the first
tensor that differs, by how much, on which rank, and what kind of fault it looks like.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import tyro

from megagpt import config
from megagpt.checks import checked_layout
from megagpt.errors import UserError
from megagpt.verify.trial import COLUMNS, Result, try_layout


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Prove that layouts of a model compute the same: loss, every gradient, norm, and three steps of the optimizer.

    A shrunk model of the preset's structure is trained for three steps in fp64 on one rank, and then on each layout in
    local ranks, and everything is compared within the bound that rounding has.
    """

    preset: tyro.conf.Positional[str] = "gpt3-125m"
    """Preset or run.toml whose structure is tried."""
    layouts: str = ""
    """Layouts, with commas: data x pipeline x tensor, then /z0 to z3, /a1 ..., /sp: 2x2x2/z1/a3/sp. None: many."""
    world: int = 8
    """Ranks at most, when no layout is named."""
    inject: str = ""
    """Plant a fault, to see it caught: --inject list names them, all tries each."""
    json: bool = False
    """Print one JSON object instead of a table."""


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
        raise UserError(
            f"--world {options.world} leaves no layout to try.", "Use --world 2 or more, or name --layouts."
        )
    for layout in layouts:
        checked_layout(_run(preset, layout))
    results = []
    if not options.json:
        print(f"{options.preset}, shrunk: the largest error over its bound, by kind (1.00 is the bound)")
        print(_row("layout", [*COLUMNS, "seconds"]))
    for layout in layouts:
        results.append(try_layout(_run(preset, layout), str(layout), fault=None))
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
            result = try_layout(faults.fitting(_run(preset, layout), name), str(layout), fault=name)
            verdict = (
                "caught and named" if result.kind == fault.kind else "NOT NAMED" if result.problem else "NOT CAUGHT"
            )
            unnamed += [] if result.kind == fault.kind else [name]
            print(f"{name} ({fault.summary}): {verdict}")
            print(f"  {result.layout}: {result.problem or 'everything agrees'}")
            sys.stdout.flush()
    return 3 if unnamed else 1


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
