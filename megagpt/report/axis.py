"""Where an axis has its ticks, and what stands beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megagpt.report.text import count


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A range of values and where it lies on the drawing: `low` at pixel `start`, `high` at pixel `end`."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of `value`."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def linear_axis(
    values: Sequence[float], *, start: float, end: float, ticks: int = 5, zero: bool = False, tight: bool = False
) -> Axis:
    """An axis over `values` (any range, also a single value) with about `ticks` round ticks.

    It begins at 0 if `zero`; it ends at the first and last value if `tight`, at a tick otherwise.
    """
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high == low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    step = round_step((high - low) / ticks)
    first, last = (
        (math.ceil(low / step), math.floor(high / step)) if tight else (math.floor(low / step), math.ceil(high / step))
    )
    positions = [number * step for number in range(first, last + 1)]
    if not tight:
        low, high = positions[0], positions[-1]
    largest = max(abs(low), abs(high))
    labels = tuple((position, tick_label(position, step=step, largest=largest)) for position in positions)
    return Axis(low=low, high=high, start=start, end=end, ticks=labels)


def log_axis(values: Sequence[float], *, start: float, end: float) -> Axis:
    """A logarithmic axis over positive `values`: ticks at 1, 2 and 5 of each decade, at 1 alone past two decades."""
    low, high = min(values), max(values)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    digits = (1, 2, 5) if high / low <= 100 else (1,)
    candidates = [digit * 10.0**decade for decade in decades for digit in digits]
    inner = [value for value in candidates if low <= value <= high]
    below = [value for value in candidates if value < low]
    above = [value for value in candidates if value > high]
    positions = below[-1:] + inner + above[:1]
    labels = tuple((position, f"{position:g}") for position in positions)
    return Axis(
        low=min(low, positions[0]), high=max(high, positions[-1]), start=start, end=end, ticks=labels, log=True
    )


def round_step(step: float) -> float:
    """The smallest of 1, 2 or 5 times a power of ten that is not below `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    digit = next(digit for digit in (1, 2, 5, 10) if digit * power >= step * (1 - 1e-9))
    return digit * power


def tick_label(value: float, *, step: float, largest: float) -> str:
    """A tick as text, with as many digits as tell neighbours apart; thin numbers with an exponent, thick with k, M."""
    if abs(value) < step / 1e6:
        return "0"
    if largest < 0.01:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(exponent)}"
    if largest >= 10_000:
        return count(value)
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
