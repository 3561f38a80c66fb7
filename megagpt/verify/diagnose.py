"""What kind of fault a difference looks like, from the numbers alone.

activations differ      the forward pass: sums, slices, masks and biases leave different traces
gradients differ        a factor that fits all, or one tensor, or parts that were never added up
only norms differ       who took part in the sum of squares
only weights differ     a copy that was not updated
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megagpt.config import Run
from megagpt.verify import task
from megagpt.verify.compare import Finding, RankPart
from megagpt.verify.reference import Outcome

Kind = Literal[
    "missing all-reduce", "scaled", "wrong slice", "stale copy", "other dropout mask", "bias on every rank",
    "norm of one rank", "unknown",
]  # fmt: skip
CLOSE = 1e-3  # relative: far above rounding, far below any of these faults


@dataclass(frozen=True)
class Diagnosis:
    """The first tensor that differs, and why."""

    finding: Finding
    kind: Kind
    words: str


def diagnose(run: Run, truth: Outcome, findings: Sequence[Finding]) -> Diagnosis | None:
    """Of all comparisons in forward order; None if nothing differs."""
    wrong = [finding for finding in findings if finding.differs()]
    if not wrong:
        return None
    first = wrong[0]
    if first.kind == "activation":
        kind, words = _activation(run, truth, first)
    elif first.kind in ("loss", "gradient"):
        kind, words = _gradients(run, [item for item in wrong if item.kind == "gradient"] or wrong, findings)
    elif first.kind == "norm":
        kind, words = "norm of one rank", "all gradients are right: the sum of squares misses other ranks' parts"
    else:
        kind, words = _weights(run, wrong)
    return Diagnosis(first, kind, words)


def _activation(run: Run, truth: Outcome, finding: Finding) -> tuple[Kind, str]:
    parts = [part for part in finding.parts if part.mesh.data_rank == finding.parts[0].mesh.data_rank]
    true = parts[0].true
    if len(parts) > 1 and all(part.true.shape == true.shape for part in parts):
        if _close(sum((part.found.double() for part in parts), torch.zeros_like(true)), true):
            return "missing all-reduce", f"the {len(parts)} ranks' values add up to the true one"
        bias = truth_bias(run, finding.name)
        if bias is not None and _close(parts[0].found.double() - (len(parts) - 1) * bias, true):
            return "bias on every rank", f"the bias is in it {len(parts)} times"
    worst = finding.worst()
    assert worst is not None
    if _other_mask(worst):
        return "other dropout mask", "elements are dropped that should stay, and the others are right"
    if _elsewhere(worst, truth.activations[finding.name]):
        return "wrong slice", "its values belong to other columns"
    rows = (worst.found.double() - worst.true).flatten(0, -2).norm(dim=1) > CLOSE * worst.true.flatten(0, -2).norm(
        dim=1
    )
    if not rows.all():
        return "wrong slice", f"{int(rows.sum())} of {len(rows)} tokens have other values, the others are right"
    return "unknown", "every value differs"


def truth_bias(run: Run, module: str) -> Tensor | None:
    """The bias that the module starts from, in fp64."""
    if run.model.biases == "none" or not module.endswith(("output", "down")):
        return None
    return task.weight(f"{module}.bias", (run.model.width,), run.seed).double()


def _other_mask(part: RankPart) -> bool:
    both = (part.found != 0) & (part.true != 0)
    changed = (part.found == 0) != (part.true == 0)
    return bool(changed.any()) and _close(part.found.double()[both], part.true[both])


def _elsewhere(part: RankPart, whole: Tensor) -> bool:
    """Whether each column of what was found is some column of the whole."""
    if part.found.shape[-1] == whole.shape[-1]:
        return False
    found, all_columns = part.found.double().flatten(0, -2), whole[: part.found.shape[0]].flatten(0, -2)
    if len(found) != len(all_columns):
        return False
    distance = torch.cdist(found.T, all_columns.T).amin(1)
    return bool((distance <= CLOSE * found.norm(dim=0)).all())


def _gradients(run: Run, wrong: Sequence[Finding], findings: Sequence[Finding]) -> tuple[Kind, str]:
    if wrong[0].kind == "loss":
        return "unknown", "the loss differs and no gradient does: it is added up wrongly"
    factors = [_factor(finding) for finding in wrong]
    everything = len(wrong) == sum(finding.kind == "gradient" for finding in findings)
    if factors[0] is not None and all(factor is not None and abs(factor - factors[0]) < CLOSE for factor in factors):
        where = "every gradient is" if everything else "it is"
        return "scaled", f"{where} {_as_words(run, factors[0])} the true one"
    if run.model.tied and [finding.name for finding in wrong] == ["embedding.token.weight"]:
        return "scaled", "only the tied embedding: the head's part and the table's do not count once each"
    if run.parallel.tensor > 1 and not everything:
        return "missing all-reduce", f"{len(wrong)} gradients on all ranks are one rank's part of the sum"
    return "unknown", f"{len(wrong)} gradients differ, by no common factor"


def _factor(finding: Finding) -> float | None:
    """The number that the true gradient must be multiplied with, if one fits."""
    found = torch.cat([part.found.double().flatten() for part in finding.parts])
    true = torch.cat([part.true.flatten() for part in finding.parts])
    factor = float(found @ true / (true @ true))
    return factor if _close(found, factor * true) else None


def _as_words(run: Run, factor: float) -> str:
    parallel, accumulation = run.parallel, task.ROWS // (run.train.micro_batch * run.parallel.data)
    sizes = {
        "the accumulation": accumulation,
        "parallel.data": parallel.data,
        "parallel.tensor": parallel.tensor,
        "parallel.pipeline": parallel.pipeline,
    }
    for name, size in sizes.items():
        if size > 1 and abs(factor * size - 1) < CLOSE:
            return f"1/{size} (by {name}) of"
        if size > 1 and abs(factor / size - 1) < CLOSE:
            return f"{size} times ({name})"
    return f"{factor:.6g} times"


def _weights(run: Run, wrong: Sequence[Finding]) -> tuple[Kind, str]:
    """A copy that some ranks did not update makes other weights differ later; its own difference tells."""
    for finding in (item for item in wrong if item.kind == "weight"):
        worst = finding.worst()
        assert worst is not None
        start = task.weight(finding.name, tuple(worst.true.shape), run.seed)
        if worst.box.size == worst.true.shape and _close(worst.found, start):
            return "stale copy", f"{finding.name} on {worst.mesh.describe()} has not moved since the start"
    return "unknown", "gradients and norms are right, and the update is not"


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a.double() - b.double()).norm() <= CLOSE * b.double().norm())
