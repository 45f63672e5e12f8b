"""Work in several fresh processes at once, which wait for each other before every lap. Standard library only."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

Laps = list[tuple[float, float]]  # seconds and CPU seconds of each


@dataclass(frozen=True)
class Lap:
    """One lap of all processes: as long as the slowest, CPU seconds of all together."""

    seconds: float
    cpu_s: float


def in_processes(work: Callable[..., Laps], shares: list[Any], *arguments: Any) -> list[Lap]:
    """`work(barrier, share, *arguments)` in a process for each share; it waits at the barrier before each lap."""
    context = get_context("spawn")
    with context.Manager() as manager:
        barrier = manager.Barrier(len(shares))
        with ProcessPoolExecutor(len(shares), mp_context=context) as pool:
            futures = [pool.submit(work, barrier, share, *arguments) for share in shares]
            laps = [future.result() for future in futures]
    return [
        Lap(max(seconds for seconds, _ in together), sum(cpu for _, cpu in together))
        for together in zip(*laps, strict=True)
    ]
