"""One driver a run: a lease with a heartbeat and a fencing number.

    <run>/leases/00000001.json    created exclusively: the holder of number 1
    <run>/leases/00000002.json    whoever took over after number 1 was released, died, or stopped beating

The highest number holds the run. A holder that lost its lease (it slept through its heartbeats) finds a higher number
when it is about to publish, and publishes nothing.
"""

import contextlib
import json
import os
import socket
import threading
import time
from typing import Any, Self

import psutil

from cluster.errors import UserError, WorkFailed
from cluster.storage import Folder

HEARTBEAT_S = 5.0
STALE_AFTER_S = 30.0
CLOCK_ADJUSTMENT_S = 2.0  # process start times are derived from the wall clock, which may be stepped


class LeaseHeld(UserError):
    """Another driver works on this run."""


class Lease:
    """Held from `with` to its end; a daemon thread keeps the heartbeat."""

    def __init__(self, run: Folder, *, heartbeat_s: float = HEARTBEAT_S, stale_after_s: float = STALE_AFTER_S) -> None:
        self._folder = run / "leases"
        self._run = run
        self._heartbeat_s = heartbeat_s
        self._stale_after_s = stale_after_s
        self._stopped = threading.Event()
        self.number = 0

    def __enter__(self) -> Self:
        self._folder.make()
        driver = driver_of(self._run, stale_after_s=self._stale_after_s)
        if driver is not None:
            raise LeaseHeld(
                f"{self._run.uri} is being worked on by process {driver['pid']} on {driver['host']} "
                f"(lease {driver['number']}, last heartbeat {max(0.0, time.time() - driver['heartbeat']):.0f} s ago). "
                f"Wait for it, stop it, or choose another --out."
            )
        held = holder(self._folder)
        self.number = (held["number"] if held else 0) + 1
        if not self._folder.create(self._name, self._body(released=False)):
            raise LeaseHeld(f"another driver has just taken {self._run.uri}. Wait for it, or choose another --out.")
        threading.Thread(target=self._beat, name="lease", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._folder.write(self._name, self._body(released=True))

    def check(self) -> None:
        """Raise `WorkFailed` where a later driver has taken the run over."""
        held = holder(self._folder)
        if held is None or held["number"] != self.number:
            raise WorkFailed(f"{self._run.uri} was taken over by another driver; this one publishes nothing more.")

    @property
    def _name(self) -> str:
        return f"{self.number:08d}.json"

    def _body(self, *, released: bool) -> bytes:
        return json.dumps(
            {
                "number": self.number,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "started": _process_start(os.getpid()),
                "heartbeat": time.time(),
                "released": released,
            }
        ).encode()

    def _beat(self) -> None:
        while not self._stopped.wait(self._heartbeat_s):
            with contextlib.suppress(OSError, WorkFailed):  # a full disk, a store that is out: the next beat may pass
                self._folder.write(self._name, self._body(released=False))


def holder(leases: Folder) -> dict[str, Any] | None:
    """The newest lease as plain data, or None where there never was one."""
    names = [name for name in leases.names() if name.endswith(".json") and not name.startswith(".")]
    held: dict[str, Any] | None = json.loads(leases.read(names[-1])) if names else None
    return held


def driver_of(run: Folder, *, stale_after_s: float = STALE_AFTER_S) -> dict[str, Any] | None:
    """The lease of the driver that is at work on `run`, or None."""
    held = holder(run / "leases")
    return held if held is not None and not held["released"] and _alive(held, stale_after_s) else None


def _alive(held: dict[str, Any], stale_after_s: float) -> bool:
    """On the holder's own machine the process table knows at once; from elsewhere only the heartbeat does."""
    if held["host"] == socket.gethostname():
        started = _process_start(held["pid"])
        if started is None or abs(started - held["started"]) > CLOCK_ADJUSTMENT_S:
            return False
    return bool(time.time() - held["heartbeat"] < stale_after_s)


def _process_start(pid: int) -> float | None:
    """When the process started: with its number, a name that is not used twice. None where it is gone."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
