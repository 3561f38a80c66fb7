"""One layout against the truth: start its ranks, let them compute, and compare what they wrote down."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from megagpt.config import Run

COLUMNS = {
    "outputs": ("activation",),
    "loss": ("loss",),
    "gradients": ("gradient",),
    "norm": ("norm",),
    "weights": ("weight",),
    "moments": ("exp_avg", "exp_avg_sq"),
}
"""What the table shows, and which comparisons each column is of."""


@dataclass(frozen=True)
class Result:
    """One layout's comparison."""

    layout: str
    seconds: float
    shares: dict[str, float]
    """Of each kind the largest error over its bound."""
    problem: str = ""
    kind: str = ""


def try_layout(run: Run, layout: str, *, fault: str | None = None) -> Result:
    """Compute the truth and the layout, and compare. A `fault` is planted in the ranks of the layout."""
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
    shares = {
        column: max(item.error / item.bound for item in found if item.kind in kinds)
        for column, kinds in COLUMNS.items()
    }
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
