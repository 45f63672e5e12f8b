"""Count, sum and second moments of vectors in float64, mergeable in a fixed order.

Rows of a shard are summed as one product, shards of a group from first to last, groups from first to last: the result
depends on the data and the grouping alone, never on which process summed what first.

Shapes: N rows, D embedding dimension.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """`total` (D,) is Σx, `products` (D, D) is Σxxᵀ."""

    count: int
    total: Float64
    products: Float64

    @classmethod
    def of(cls, vectors_ND: NDArray[Any]) -> "Moments":
        x_ND = vectors_ND.astype(np.float64)
        return cls(len(x_ND), x_ND.sum(axis=0), x_ND.T @ x_ND)

    @classmethod
    def zero(cls, dimension: int) -> "Moments":
        return cls(0, np.zeros(dimension), np.zeros((dimension, dimension)))

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.products + other.products)

    def mean(self) -> Float64:
        return self.total / self.count

    def covariance(self) -> Float64:
        """Of the population (divided by the count), symmetric to the last bit."""
        mean_D = self.mean()
        covariance_DD = self.products / self.count - np.outer(mean_D, mean_D)
        return (covariance_DD + covariance_DD.T) / 2.0


def merge(parts: Iterable[Moments], dimension: int, *, group: int) -> Moments:
    """The sum of `parts` (one a shard, in order), by groups of `group`."""
    total, current, held = Moments.zero(dimension), Moments.zero(dimension), 0
    for part in parts:
        current, held = current + part, held + 1
        if held == group:
            total, current, held = total + current, Moments.zero(dimension), 0
    return total + current if held else total
