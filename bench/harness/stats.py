"""Order statistics of timings: no means, because the noise of a shared machine only ever adds."""

from __future__ import annotations

import math
from collections.abc import Sequence


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile (0 <= q <= 1) with linear interpolation between order statistics."""
    if not values:
        raise ValueError("values is empty; expected at least one timing")
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"q must be in [0, 1], got {q!r}")
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(values: Sequence[float]) -> dict[str, float]:
    """{"median", "p20", "p80"} of the values."""
    return {"median": quantile(values, 0.5), "p20": quantile(values, 0.2), "p80": quantile(values, 0.8)}


def median_error(values: Sequence[float]) -> float:
    """Half the width of the median's 95 % confidence interval, relative to the median; infinite below 6 values.

    The interval runs between the order statistics n/2 -+ 0.98 sqrt(n), which holds for any distribution (the number of
    values below the median is binomial); no two of fewer than 6 values enclose the median with 95 % confidence.
    """
    n = len(values)
    if n < 6:
        return math.inf
    ordered = sorted(values)
    reach = 0.98 * math.sqrt(n)
    low = max(0, math.floor(n / 2 - reach))
    high = min(n - 1, math.ceil(n / 2 + reach) - 1)
    return (ordered[high] - ordered[low]) / 2 / quantile(ordered, 0.5)


def paired_speedup(baseline: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """How many times sooner `other` is done: quantiles of the ratios of turns that ran next to each other.

    Both sequences hold one time per round; load that lasts longer than a round cancels in the ratio.
    """
    if len(baseline) != len(other):
        raise ValueError(f"both need one time per round, got {len(baseline)} and {len(other)}")
    return summary([b / o for b, o in zip(baseline, other, strict=True)])
