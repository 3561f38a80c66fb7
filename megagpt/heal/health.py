"""What a finished step says about the run's health. A pure judgement on what all ranks know: they all judge alike.

    skipped     the loss or a gradient was not finite, and AdamW took no step; more than heal.skip_budget among any 100
                steps, or an fp16 loss scale at its floor, and the run has diverged. An overflow that fp16's scale
                answers by falling is no fault and has no budget.
    spike       (loss - median) / (1.4826 x median absolute deviation) > heal.spike_score for heal.spike_steps in a
                row, over the last heal.spike_window losses that were none. 1.4826 makes it the standard deviation of a
                normal distribution, and neither it nor the median moves for a few wild values. What to do about it was
                shown by Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, section 5.1).

The state is small and goes into every checkpoint, so that a run which continues judges as one that never stopped.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from megagpt.config import Heal
from megagpt.errors import RunFailure
from megagpt.parallel.engine import Step

SKIP_WINDOW = 100
LEAST_SCALE = 1.0  # DeepSpeed's floor: at it the next overflow would raise
_LEAST_SPREAD = 1e-4  # of the median: losses that hardly move must not make every wiggle a spike

Verdict = Literal["well", "skipped", "spike"]


class Health:
    """The judgements so far."""

    def __init__(self, heal: Heal, saved: Mapping[str, Any], *, fp16: bool) -> None:
        """`saved` is what `state` gave when the run was saved, or nothing."""
        self._heal, self._fp16 = heal, fp16
        self._losses: list[float] = list(saved.get("losses", []))
        self._streak: list[int] = list(saved.get("streak", []))
        self._skips: list[int] = list(saved.get("skips", []))
        self.rollbacks: int = saved.get("rollbacks", 0)

    def state(self) -> dict[str, Any]:
        return {"losses": self._losses, "streak": self._streak, "skips": self._skips, "rollbacks": self.rollbacks}

    def skipped_before(self, steps: Sequence[int]) -> None:
        """Count also these steps of earlier attempts: some were skipped after the run was saved."""
        self._skips = sorted({*self._skips, *steps})

    def judge(self, done: Step, step: int) -> Verdict:
        """What to make of `step`. Raises RunFailure if the run has diverged."""
        if done.skipped:
            self._count_skip(done, step)
            return "skipped"
        if self._heal.spike_score <= 0:
            return "well"
        if self.score(done.loss) <= self._heal.spike_score:
            self._losses = [*self._losses, done.loss][-self._heal.spike_window :]
            self._streak = []
            return "well"
        self._streak = [*self._streak, step]
        return "spike" if len(self._streak) >= self._heal.spike_steps else "well"

    def score(self, loss: float) -> float:
        """The robust z-score of a loss; 0 before the window is full."""
        if len(self._losses) < self._heal.spike_window:
            return 0.0
        median = statistics.median(self._losses)
        spread = 1.4826 * statistics.median(abs(loss - median) for loss in self._losses)
        return (loss - median) / max(spread, _LEAST_SPREAD * abs(median), 1e-12)

    def spike_began(self) -> int:
        """The first step of the present spike."""
        return self._streak[0]

    def let_pass(self) -> None:
        """Nothing can be done about the present spike: its steps are not counted again."""
        self._streak = []

    def _count_skip(self, done: Step, step: int) -> None:
        if self._fp16 and done.next_loss_scale <= LEAST_SCALE:
            raise RunFailure(
                f"step {step:,} overflows in fp16 at a loss scale of {done.loss_scale:g}: the scale has collapsed, "
                "and the run has diverged.",
                "Continue from a checkpoint with a lower optim.lr, or train in bf16 or fp32.",
                cause="diverged",
                rank=done.seen_by,
            )
        if self._fp16 and math.isfinite(done.loss):
            return  # the scale was too high, and falls
        self._skips = sorted({step, *(at for at in self._skips if at > step - SKIP_WINDOW)})
        if len(self._skips) > self._heal.skip_budget:
            raise RunFailure(
                f"step {step:,} has loss {done.loss:g} and gradient norm {done.grad_norm:g}, and is one of "
                f"{len(self._skips)} such steps among the last {SKIP_WINDOW}; heal.skip_budget = "
                f"{self._heal.skip_budget}: the run has diverged.",
                f"Continue from a checkpoint before step {self._skips[0]:,}, with a lower optim.lr.",
                cause="diverged",
                rank=done.seen_by,
            )
