"""How many requests one host is asked to bear at a time, and how fast connections to it are opened.

A small server has room for a handful of connections that it has not accepted yet; what comes on top is dropped by its
kernel and asked for again after 1, 3, 7 seconds. So the number of connections opened without having answered starts
small, grows by one with each that answers, and halves when one took as long as a dropped one takes.

The number of requests in flight grows likewise, as long as the fastest of the last answers was about as fast as with
few in flight. Where it is slower, requests queue inside the server (or in us), and more of them would help nobody.
"""

_FIRST_OPENING = 4.0
_MOST_OPENING = 256.0
_FEWEST_OPENING = 2.0
_FIRST_IN_FLIGHT = 8.0
_ALWAYS_IN_FLIGHT = 64.0
_DROPPED_S = 0.9
_ROUND = 16


class Pace:
    """Of one host."""

    __slots__ = ("_base_s", "_calm_after", "_fastest_s", "_in_round", "_rejected", "in_flight", "opening")

    def __init__(self) -> None:
        self.opening = _FIRST_OPENING
        self.in_flight = _FIRST_IN_FLIGHT
        self._calm_after = 0.0
        self._base_s = self._fastest_s = float("inf")
        self._in_round = 0
        self._rejected = False

    def connected(self, seconds: float, now: float) -> None:
        if seconds > _DROPPED_S:
            self.troubled(now)

    def first_answer(self, seconds: float, now: float) -> None:
        """A new connection's first byte came, `seconds` after its request was sent."""
        if self._base_s < float("inf") and seconds > _DROPPED_S + 3 * self._base_s:
            self.troubled(now)
        else:
            # After trouble it grows by one a round, not by one a connection.
            self.opening = min(_MOST_OPENING, self.opening + (1 / self.opening if self._calm_after else 1.0))

    def troubled(self, now: float) -> None:
        """A connection was dropped, or looks like it. One halving a second: what fails together is one event."""
        if now >= self._calm_after:
            self._calm_after = now + 1.0
            self.opening = max(_FEWEST_OPENING, self.opening / 2)

    def answered(self, seconds: float, most: int) -> None:
        """An answer's first byte came `seconds` after its request; `most` is as far as it may grow."""
        if self._rejected or self.in_flight < _ALWAYS_IN_FLIGHT:
            self.in_flight += 1 / self.in_flight if self._rejected else 1.0
        self._fastest_s = min(self._fastest_s, seconds)
        self._in_round += 1
        if self._in_round < _ROUND:
            return
        self._base_s = min(self._fastest_s, self._base_s * 1.02)
        if not self._rejected and self.in_flight >= _ALWAYS_IN_FLIGHT:
            if self._fastest_s <= 2 * self._base_s + 0.01:
                self.in_flight = min(float(most), self.in_flight + self._in_round)
            elif self._fastest_s > 4 * self._base_s + 0.05:
                self.in_flight = max(_ALWAYS_IN_FLIGHT, self.in_flight - self._in_round)
        self._fastest_s, self._in_round = float("inf"), 0

    def rejected(self) -> None:
        """The host said that it is asked too much (429, 503)."""
        self._rejected = True
        self.in_flight = max(1.0, self.in_flight / 2)
