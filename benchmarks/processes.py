"""A floor in as many processes as its stage used, all working at once.

    prepare(config, run, stage, rank, processes) -> work      in each process, untimed: read, decode, build, warm up
    work() -> seconds                                         the process's share of the stage, measured by itself

Before each repeat the processes wait for each other, as they compete for the same memory and caches in the run. A
repeat took as long as its slowest process. The same processes serve every floor: importing torch takes seconds.
"""

import gc
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any, Self

from cluster.errors import WorkFailed
from pipeline.config import RunConfig

Work = Callable[[], float]
Prepare = Callable[[RunConfig, str, str, int, int], Work]
PREPARE_TIMEOUT_S = 600.0


class Processes:
    """`size` spawned processes. Use as a context manager."""

    def __init__(self, size: int) -> None:
        context = get_context("spawn")  # a fork would inherit the threads of numpy and torch
        # Held here: a barrier that nobody refers to has its semaphores unlinked, perhaps before a process opens them.
        self._barriers = {count: context.Barrier(count) for count in range(1, size + 1)}
        self._connections, self._members = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            member = context.Process(target=_member, args=(rank, self._barriers, theirs), daemon=True)
            member.start()
            theirs.close()
            self._connections.append(ours)
            self._members.append(member)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections:
            connection.close()
        for member in self._members:
            member.join(timeout=10)
            if member.is_alive():
                member.terminate()
                member.join()

    def seconds_of(
        self, prepare: Prepare, config: RunConfig, run: str, stage: str, *, processes: int, repeats: int
    ) -> list[float]:
        """Seconds of each repeat."""
        taken = self._connections[:processes]
        try:
            for connection in taken:
                connection.send((prepare, config, run, stage, processes, repeats))
            answers = [connection.recv() for connection in taken]
        except (EOFError, OSError):
            raise WorkFailed(f"a process that measures the floor of {stage} died") from None
        if failed := [answer for answer in answers if isinstance(answer, str)]:
            raise WorkFailed(f"the floor of {stage} cannot be measured:\n{failed[0]}")
        return [max(laps) for laps in zip(*answers, strict=True)]


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _member(rank: int, barriers: dict[int, Any], connection: Any) -> None:
    while True:
        try:
            prepare, config, run, stage, processes, repeats = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        barrier = barriers[processes]
        try:
            work: Work = prepare(config, run, stage, rank, processes)
            laps = []
            for _ in range(repeats):
                barrier.wait(PREPARE_TIMEOUT_S)
                laps.append(work())
            del work
            gc.collect()  # a model, its optimizer and its batch are not the next floor's load
            connection.send(laps)
        except BaseException:
            barrier.abort()  # the others must not wait
            connection.send(traceback.format_exc())
