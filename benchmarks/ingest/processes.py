"""A command in a session of its own, with the memory of all its processes.

Memory is the proportional set size, summed: what processes share counts once. Reading it costs CPU time, so a run
whose memory is sampled is not one whose seconds are counted.
"""

import os
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

SAMPLE_S = 0.25


@dataclass(frozen=True)
class Ran:
    """A command that has ended. Clocks are CLOCK_MONOTONIC and, for file times, the wall's."""

    seconds: float
    started: float
    started_wall: float
    peak_bytes: int


def run_command(command: list[str], log: Path, *, memory: bool = False, **environment: str) -> Ran:
    """Raises `RuntimeError` with the end of what it said where it fails."""
    started, started_wall = time.monotonic(), time.time()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **environment},
        )
        sampler = Sampler(process.pid) if memory else None
        code = process.wait()
        seconds = time.monotonic() - started
        peak = sampler.stop() if sampler else 0
    if code:
        said = log.read_text(errors="replace")[-3000:]
        raise RuntimeError(f"{' '.join(command)} ended with exit code {code}:\n{said}")
    return Ran(seconds, started, started_wall, peak)


class Sampler:
    """The highest sum of the memory of a session's processes, until it is stopped."""

    def __init__(self, leader: int) -> None:
        self._leader = leader
        self._peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def stop(self) -> int:
        self._ended.set()
        self._thread.join()
        return self._peak

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self._peak = max(self._peak, session_bytes(self._leader))


def session_bytes(leader: int) -> int:
    return sum(_proportional_bytes(process) for process in session_of(leader))


def session_of(leader: int) -> list[psutil.Process]:
    """Every process of a session: Ray's workers have process groups of their own, the session they share."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader:
                found.append(process)
        except (ProcessLookupError, PermissionError):
            continue
    return found


def _proportional_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0
