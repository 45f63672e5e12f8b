"""How many bytes of bodies one worker holds: those that arrive and those that wait to be used.

When they are too many, reading stops on every connection, which the network passes on to the servers. Where all the
bytes belong to bodies that are still arriving, the oldest of these goes on, because nobody else can make room. So
there is at most one read (of 256 KB) too much, and the rest of one body.

Long before that there is plenty: more waits to be used than one worker uses until a host that answers at once has sent
more. What is fetched earlier costs memory that has to be set aside, and has left the processor's cache by then.
"""

from collections.abc import Callable
from typing import Protocol

# Below this share of the limit there is room again: stopping and starting again costs a system call a connection.
_ROOM_AGAIN = 0.75
_PLENTY_BYTES = 16_000_000


class Arriving(Protocol):
    """A body on its way; `charged` bytes of it are here."""

    charged: int

    def pause(self) -> None: ...
    def resume(self) -> None: ...


class ByteBudget:
    """`on_room` is called when there is room again, or no longer plenty."""

    def __init__(self, limit_bytes: int, on_room: Callable[[], None]) -> None:
        self._limit = limit_bytes
        self._plenty = min(_PLENTY_BYTES, limit_bytes / 2)
        self._on_room = on_room
        self._arriving: dict[Arriving, bool] = {}  # whether it is paused; oldest first
        self._oldest: Arriving | None = None
        self._held = 0  # of bodies that are whole, whose users will give them back
        self.used = 0
        self.has_room = True
        self.has_plenty = False

    def begin(self, body: Arriving) -> None:
        """It was asked for."""
        self._arriving[body] = False
        if not self.has_room:
            self._pause(body)

    def take(self, body: Arriving, size: int) -> None:
        self.used += size
        if self.used > self._limit and self.has_room:
            self.has_room = False
            for other in list(self._arriving):
                self._pause(other)
            self._let_the_oldest_go_on()

    def arrived(self, body: Arriving) -> None:
        """No more of it will come. Its bytes stay taken."""
        if self._arriving.pop(body, None) is not None:
            self._held += body.charged
            self.has_plenty = self.has_plenty or self._held > self._plenty
            self._let_the_oldest_go_on()

    def unfolded(self, body: Arriving, size: int) -> None:
        """A body that is whole takes so many bytes more (or fewer) than it came with."""
        self._held += size
        self.take(body, size)

    def give_back(self, size: int) -> None:
        self.used -= size
        self._held -= size
        had_plenty = self.has_plenty
        self.has_plenty = had_plenty and self._held > _ROOM_AGAIN * self._plenty
        if not self.has_room and self.used <= _ROOM_AGAIN * self._limit:
            self.has_room, self._oldest = True, None
            for body in list(self._arriving):
                self._resume(body)
            self._on_room()
        elif had_plenty and not self.has_plenty:
            self._on_room()
        self._let_the_oldest_go_on()

    def _let_the_oldest_go_on(self) -> None:
        if self.has_room or self._held or (self._oldest is not None and self._oldest in self._arriving):
            return
        self._oldest = next((body for body in self._arriving if body.charged), None)
        if self._oldest is not None:
            self._resume(self._oldest)

    def _pause(self, body: Arriving) -> None:
        if not self._arriving[body]:
            self._arriving[body] = True
            body.pause()

    def _resume(self, body: Arriving) -> None:
        if self._arriving[body]:
            self._arriving[body] = False
            body.resume()
