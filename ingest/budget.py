"""How many bytes of bodies one worker holds: those that arrive and those that wait to be used.

A body that has no room stops being read, which the network passes on to its server. The oldest of the arriving ones
always goes on, so that bodies which wait for one another cannot stand still for ever.
"""

from collections.abc import Callable
from typing import Protocol

_RESUMED_FOR_BYTES = 1 << 18


class Arriving(Protocol):
    """A body on its way."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...


class ByteBudget:
    """`on_room` is called when bytes were given back and there is room again."""

    def __init__(self, limit_bytes: int, on_room: Callable[[], None]) -> None:
        self._limit = limit_bytes
        self._on_room = on_room
        self._arriving: dict[Arriving, bool] = {}  # whether it is paused; oldest first
        self.used = 0

    @property
    def has_room(self) -> bool:
        return self.used < self._limit

    def take(self, body: Arriving, size: int) -> None:
        self.used += size
        paused = self._arriving.setdefault(body, False)
        if self.used > self._limit and not paused and next(iter(self._arriving)) is not body:
            self._arriving[body] = True
            body.pause()

    def arrived(self, body: Arriving) -> None:
        """No more of it will come. Its bytes stay taken."""
        if self._arriving.pop(body, None) is not None and self.used > self._limit:
            self._resume()

    def give_back(self, size: int) -> None:
        was_full = self.used >= self._limit
        self.used -= size
        if was_full and self._arriving:
            self._resume()
        if was_full and self.has_room:
            self._on_room()

    def _resume(self) -> None:
        """The oldest, and as many more as there is room for."""
        room = self._limit - self.used
        for place, (body, paused) in enumerate(list(self._arriving.items())):
            if place and room <= 0:
                break
            if paused:
                self._arriving[body] = False
                body.resume()
                room -= _RESUMED_FOR_BYTES
