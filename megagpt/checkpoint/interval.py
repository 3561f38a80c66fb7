"""How often to save: the interval that loses the least time to saves and to failures together.

With a save of d seconds and a mean of M seconds between failures, an interval of t seconds loses about d / t of the
time to saves and t / 2M to steps computed again. The sum is least at t = sqrt(2 d M) (Young 1974, "A first order
approximation to the optimum checkpoint interval"); Daly's expansion (2006, "A higher order estimate of the optimum
checkpoint interval for restart dumps", eq. 37) holds where a save is not short beside M:
    t = sqrt(2 d M) (1 + sqrt(d / 2M) / 3 + d / 18M) - d    for d < 2M, else M
"""

from __future__ import annotations

import math


def best_interval(*, save_seconds: float, mtbf_seconds: float) -> float:
    """Seconds of training between two saves, by Young and Daly."""
    if save_seconds >= 2 * mtbf_seconds:
        return mtbf_seconds
    ratio = save_seconds / (2 * mtbf_seconds)
    return math.sqrt(2 * save_seconds * mtbf_seconds) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_seconds
