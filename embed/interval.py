"""The exact (Clopper-Pearson) interval of a share."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

BISECTIONS = 50


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The two-sided interval that contains the true share at least `confidence` of the time.

    Its ends are the shares at which seeing so many, or so few, has probability (1 - confidence) / 2. Without trials it
    is [0, 1]: nothing is known.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials")
    tail = (1.0 - confidence) / 2.0
    count_T = np.arange(trials + 1, dtype=np.float64)
    steps_T = np.log(np.arange(trials, 0, -1) / np.arange(1, trials + 1)) if trials else np.zeros(0)
    log_choose_T = np.concatenate([np.zeros(1), np.cumsum(steps_T)])

    def probability(share: float, which: slice) -> float:
        log_T = log_choose_T[which] + count_T[which] * np.log(share) + (trials - count_T[which]) * np.log1p(-share)
        return _sum_of_exp(log_T)

    low = _bisect(lambda share: probability(share, slice(successes, None)) >= tail) if successes else 0.0
    high = _bisect(lambda share: probability(share, slice(0, successes + 1)) <= tail) if successes < trials else 1.0
    return low, high


def _bisect(reached: Callable[[float], bool]) -> float:
    """The smallest share in (0, 1) from which `reached` is true."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2.0
        low, high = (low, middle) if reached(middle) else (middle, high)
    return (low + high) / 2.0


def _sum_of_exp(log_T: NDArray[np.float64]) -> float:
    largest = float(log_T.max())
    return float(np.exp(log_T - largest).sum() * np.exp(largest))
