"""Numbers as people read them: counts, durations and shares, the same on the console and in the report."""

from __future__ import annotations

import math

_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def count(number: float) -> str:
    """Four digits and a suffix from a thousand on: 124,439,808 is 124.4M."""
    for size, suffix in _SUFFIXES:
        if abs(number) >= size:
            return f"{number / size:.4g}{suffix}"
    return f"{number:.4g}"


def duration(seconds: float) -> str:
    """The two largest units: 48 s, 12 min 05 s, 3 h 07 min, 2 d 04 h; "unknown" for what is not finite."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 10 or whole == seconds else f"{seconds:.1f} s"
    minutes, hours, days = whole // 60, whole // 3600, whole // 86_400
    if hours == 0:
        return f"{minutes} min {whole % 60:02} s"
    if days == 0:
        return f"{hours} h {minutes % 60:02} min"
    return f"{days} d {hours % 24:02} h"


def share(part: float | None) -> str:
    """0.4123 -> "41.2%"; "?" for None."""
    return "?" if part is None else f"{100 * part:.1f}%"
