"""The processes of a run, as its operating system sees them."""

import os
import signal

import psutil


def session_of(leader: int) -> list[psutil.Process]:
    """Every process of the session: Ray's workers have process groups of their own, the session they share."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, PermissionError, psutil.NoSuchProcess):
            continue
    return found


def named(leader: int, word: str) -> list[psutil.Process]:
    """Those of the session whose command line holds `word`."""
    found = []
    for process in session_of(leader):
        try:
            if word in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill_all(processes: list[psutil.Process]) -> int:
    """SIGKILL to each → how many were there to receive it."""
    hit = 0
    for process in processes:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        hit += 1
    return hit
