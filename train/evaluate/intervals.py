"""Confidence intervals of shares."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Proportion:
    """`correct` of `total`, with Wilson's 95% interval (Wilson 1927), which holds near 0 and 1 and for small totals."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        n, share, z2 = self.total, self.value, Z_95**2
        centre = (share + z2 / (2 * n)) / (1 + z2 / n)
        reach = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
        return max(0.0, centre - reach), min(1.0, centre + reach)

    def plain(self) -> dict[str, float | int]:
        low, high = self.interval
        return {"correct": self.correct, "total": self.total, "accuracy": self.value, "low": low, "high": high}
