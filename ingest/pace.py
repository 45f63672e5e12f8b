"""How many requests one host is asked to bear at a time, and how fast connections to it are opened.

A small server has room for a handful of connections that it has not accepted yet. What comes on top is dropped by its
kernel, and ours tries again after 1, 3, 7 seconds: a burst of new connections loses rows to their deadline on a server
that would have served every one of them in time. So a few connections at a time are opened without having answered
yet, and beyond those one every few milliseconds: the sooner the more have answered, the later when one took as long as
a dropped one takes, and none while more are unanswered than the server's usual latency explains.

The number of requests in flight grows as long as answers come about as fast as with few in flight. Where they are
slower, requests queue inside the server (or in us), and more of them would help nobody.
"""

from math import inf

_UNANSWERED = 4
_UNANSWERED_AFTER_TROUBLE = 2
_FIRST_GAP_S = 0.005
_SHORTEST_GAP_S = 0.0005
_LONGEST_GAP_S = 0.1
_GAP_SHRINKS = 64 / 65
# A stall of our event loop must not be followed by the burst that it held back.
_CAUGHT_UP_S = 0.002
_FIRST_IN_FLIGHT = 64.0
_DROPPED_S = 0.9
_ROUND = 16
_FORGOTTEN_A_S = 0.02
# In this time one worker does not use up what is plenty (`ingest/budget.py`).
_AT_ONCE_S = 0.05


class Pace:
    """Of one host."""

    __slots__ = (
        "_base_s", "_calm_after", "_gap_s", "_in_round", "_next_at", "_rejected", "_round_at", "_sum_s", "_unanswered",
        "in_flight",
    )  # fmt: skip

    def __init__(self) -> None:
        self.in_flight = _FIRST_IN_FLIGHT
        self._unanswered = _UNANSWERED
        self._gap_s = _FIRST_GAP_S
        self._next_at = self._calm_after = self._round_at = 0.0
        self._base_s = inf
        self._sum_s = 0.0
        self._in_round = 0
        self._rejected = False

    @property
    def answers_at_once(self) -> bool:
        """Known only after some answers."""
        return self._base_s <= _AT_ONCE_S

    def may_open(self, unanswered: int, oldest: float, now: float) -> float:
        """When another connection may be opened beside so many unanswered ones, the oldest opened at `oldest`."""
        if unanswered and now - oldest > self._suspicious_s():
            self.troubled(now)
        if unanswered < self._unanswered:
            return now
        # At this rate so many are on their way in a server that lets none wait; what is beyond stands at its door.
        on_their_way = 2 * self._usual_s() / self._gap_s
        return max(now, self._next_at) if unanswered < self._unanswered + on_their_way else inf

    def opens(self, now: float) -> None:
        self._next_at = max(self._next_at, now - _CAUGHT_UP_S) + self._gap_s

    def first_answer(self, opened_at: float, now: float) -> None:
        """A new connection has answered."""
        if now - opened_at > self._suspicious_s():
            self.troubled(now)
        elif now >= self._calm_after:
            self._gap_s = max(_SHORTEST_GAP_S, self._gap_s * _GAP_SHRINKS)

    def troubled(self, now: float) -> None:
        """A connection was dropped, or looks like it. Once a second: what fails together is one event."""
        if now >= self._calm_after:
            self._calm_after = now + 1.0
            self._unanswered = _UNANSWERED_AFTER_TROUBLE
            self._gap_s = min(_LONGEST_GAP_S, max(_FIRST_GAP_S, self._gap_s) * 2)

    def _usual_s(self) -> float:
        if self._base_s < inf:
            return self._base_s
        return self._sum_s / self._in_round if self._in_round else 0.0

    def _suspicious_s(self) -> float:
        """How long a connection that was not dropped never takes."""
        return _DROPPED_S + (4 * self._base_s if self._base_s < inf else 3.0)

    def answered(self, seconds: float, now: float, most: int) -> None:
        """An answer's first byte came `seconds` after its request; `most` is as far as it may grow."""
        if self._rejected:
            self.in_flight = min(float(most), self.in_flight + 1 / self.in_flight)
        self._sum_s += seconds
        self._in_round += 1
        if self._in_round < _ROUND:
            return
        mean_s = self._sum_s / _ROUND
        # What was fast once is not held against the server for ever.
        self._base_s = min(mean_s, self._base_s * (1 + _FORGOTTEN_A_S * (now - self._round_at)))
        self._round_at = now
        self._sum_s, self._in_round = 0.0, 0
        if self._rejected:
            return
        if mean_s <= 1.5 * self._base_s + 0.01:
            self.in_flight = min(float(most), self.in_flight + _ROUND)
        elif mean_s > 3 * self._base_s + 0.1:
            self.in_flight = max(_FIRST_IN_FLIGHT, self.in_flight - _ROUND)

    def rejected(self) -> None:
        """The host said that it is asked too much (429, 503)."""
        self._rejected = True
        self.in_flight = max(1.0, self.in_flight / 2)
