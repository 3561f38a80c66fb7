"""Half precision on cut layouts: as near to the fp64 truth as bf16's 8 and fp16's 11 bits allow."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megagpt import config
from megagpt.parallel import ranks
from megagpt.verify.compare import findings
from megagpt.verify.layouts import parse
from megagpt.verify.measure import measure
from megagpt.verify.reference import compute
from megagpt.verify.task import run_of

LAYOUTS = [
    "1x1x2/z0/a1",
    "1x1x2/z1/a3/sp",
    "2x1x2/z2/a1",
    "2x1x2/z3/a3",
    "1x2x1/z0/a3",
    "2x2x1/z1/a3",
    "1x2x2/z1/a3/sp",
]
ROUNDINGS = 16  # unit roundoffs that a tensor of a four-layer model may be off by
UNIT = {"bf16": 2.0**-8, "fp16": 2.0**-11}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_as_the_truth_does(tmp_path: Path, layout: str, precision: str):
    run = run_of(config.load("gpt3-125m"), parse(layout))
    truth = compute(run)
    train = dataclasses.replace(run.train, precision=precision)  # pyright: ignore[reportArgumentType]
    run = dataclasses.replace(run, train=train)
    assert ranks.run_local(lambda: measure(run, tmp_path, None), run.parallel.world_size()) == 0
    for found in findings(run, truth, tmp_path):
        limit = ROUNDINGS * UNIT[precision] * (2 if found.kind == "exp_avg_sq" else 1)  # a square has twice the error
        assert found.error <= limit, f"{found.kind} {found.name} is off by {found.error}"
