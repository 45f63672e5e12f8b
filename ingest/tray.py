"""Memory that a worker shares with one decoding child: bodies lie there on their way in, pictures on their way out.

It has a place for each job that the child may have at a time, which spares both sides a pipe's pages and copies. What
does not fit its place goes through the pipe. The size is sealed: a child that cut it would kill its worker. And what
the worker takes out is a copy: whatever the child writes later, the worker has what it had.
"""

import fcntl
import mmap
import os

PLACES = 3
_PLACE_BYTES = 1 << 20
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Tray:
    """Use the same descriptor on both sides."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, PLACES * _PLACE_BYTES)

    def holds(self, data: bytes) -> bool:
        return len(data) <= _PLACE_BYTES

    def put(self, place: int, data: bytes) -> None:
        start = place * _PLACE_BYTES
        self._memory[start : start + len(data)] = data

    def take(self, place: int, length: int) -> bytes:
        """Raises `ValueError` for what lies in no place."""
        if not (0 <= place < PLACES and length <= _PLACE_BYTES):
            raise ValueError(f"{length} bytes at place {place} of {PLACES}")
        start = place * _PLACE_BYTES
        return self._memory[start : start + length]

    def close(self) -> None:
        self._memory.close()


def tray_memory() -> int:
    """A descriptor, to be closed by the caller."""
    descriptor = os.memfd_create("tray", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, PLACES * _PLACE_BYTES)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    return descriptor
