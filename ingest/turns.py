"""Whose turn it is: a fair queue over hosts, and the connections that are kept between turns.

    row ──► turn(host) ──► a kept connection, or None: open one ──► … ──► done(host, connection)

Hosts with waiting rows take turns, one row at a time. A host whose turn it is may still have to wait: for its pace,
its share of the run's limits, a rest that it asked for, because it already fills three quarters of what is free, or
because it answers at once and there is plenty to do without it. It then leaves the round, and whatever ends its waiting
brings it back.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from math import inf
from time import monotonic

from ingest.connection import Connection
from ingest.host import Errand, Host, HostGone, Waiter

HOST_DOWN = "host_down"
_IDLE_S = 4.0
MOST_IDLE = 2048
# A host may have this many times as many requests in flight as there are free slots.
_SHARE_OF_FREE = 3


class Turns:
    """`may_ask` says when a limited host may be asked: not after now, then, or for ever where it will wake the host."""

    def __init__(
        self,
        *,
        concurrency: int,
        host_failures: int,
        host_cooldown_s: float,
        host_patience_s: float,
        has_room: Callable[[], bool],
        has_plenty: Callable[[], bool],
        may_ask: Callable[[Host, float], float],
        gave_back: Callable[[Host], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._concurrency = concurrency
        self._host_failures = host_failures
        self._cooldown_s = host_cooldown_s
        self._patience_s = host_patience_s
        self._has_room = has_room
        self._has_plenty = has_plenty
        self._may_ask = may_ask
        self._gave_back = gave_back
        self._round: deque[Host] = deque()
        self._crowding: set[Host] = set()
        self._quick: dict[Host, None] = {}  # with rows that can wait while there is plenty; in the order of their turns
        self._idle: OrderedDict[Connection, tuple[Host, float]] = OrderedDict()
        self._paused = False
        self._error: Exception | None = None
        self.in_flight = 0
        self.waiting = 0
        self.cooling: set[Host] = set()

    # Turns.

    async def turn(self, host: Host, errand: Errand) -> Connection | None:
        """Wait for a turn. Every turn taken ends with `done`. Raises `HostGone`, and the error of `fail_all`."""
        if self._error is not None:
            raise self._error
        now = monotonic()
        if host.resting_until > now:
            self._be_patient(host, errand, now)
        elif not host.waiting and self._is_free() and self._may_start(host, now):
            return self._start(host, errand, now)
        waiter = Waiter(self._loop.create_future(), errand)
        host.waiting.append(waiter)
        self.waiting += 1
        self.wake(host)
        try:
            return await waiter.turn
        except asyncio.CancelledError:
            if waiter.turn.done() and not waiter.turn.cancelled() and waiter.turn.exception() is None:
                self.done(host, errand, waiter.turn.result())
            elif waiter in host.waiting:
                host.waiting.remove(waiter)
                self.waiting -= 1
            raise

    def done(self, host: Host, errand: Errand, connection: Connection | None) -> None:
        """The turn is over. `connection` is None where none came to be."""
        host.opening.pop(errand, None)
        self.in_flight -= 1
        host.in_flight -= 1
        limit = host.grant.connections if host.limited else self._concurrency
        if connection is not None and connection.reusable and host.open <= limit:
            now = monotonic()
            host.idle.append(connection)
            self._idle[connection] = (host, now)
            connection.on_lost = self._lost
            if len(self._idle) > MOST_IDLE:
                self._close_idle(next(iter(self._idle)))
        else:
            if connection is not None:
                connection.close()
            host.open -= 1
        if not host.busy:
            self._gave_back(host)
        self.wake(host)
        if self._crowding:
            for crowding in list(self._crowding):
                self.wake(crowding)

    def wake(self, host: Host) -> None:
        """Something that the host waited for may have come."""
        if host.waiting and not host.queued:
            host.queued = True
            self._round.append(host)
        if self._round:
            self.go_on()

    def go_on(self) -> None:
        """Start all that may start."""
        now = monotonic()
        while self._round and self._is_free():
            host = self._round.popleft()
            host.queued = False
            if not host.waiting or not self._may_start(host, now):
                continue
            waiter = host.waiting.popleft()
            self.waiting -= 1
            if host.waiting:
                host.queued = True
                self._round.append(host)
            if not waiter.turn.done():
                waiter.turn.set_result(self._start(host, waiter.errand, now))

    def room(self) -> None:
        """There is room again, or no longer plenty."""
        quick, self._quick = self._quick, {}
        for host in quick:
            self.wake(host)
        self.go_on()

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        self.go_on()

    def _is_free(self) -> bool:
        return self.in_flight < self._concurrency and not self._paused and self._has_room()

    def _may_start(self, host: Host, now: float) -> bool:
        if host.resting_until > now:
            self.wake_at(host, host.resting_until)
            return False
        if host.down_since is not None and host.in_flight:
            return False  # one probe at a time
        if host.in_flight > _SHARE_OF_FREE * (self._concurrency - self.in_flight):
            self._crowding.add(host)
            return False
        self._crowding.discard(host)
        if host.pace.answers_at_once and self._has_plenty():
            self._quick[host] = None
            return False
        at = now
        if not host.idle:
            if host.in_flight >= int(host.pace.in_flight):
                return False
            at = host.pace.may_open(len(host.opening), next(iter(host.opening.values()), now), now)
        if host.limited:
            at = max(at, self._may_ask(host, now))
        if now < at < inf:
            self.wake_at(host, at)
        return at <= now

    def _start(self, host: Host, errand: Errand, now: float) -> Connection | None:
        self.in_flight += 1
        host.in_flight += 1
        if host.limited:
            host.grant.use_place()
        if host.idle:
            connection = host.idle.pop()
            del self._idle[connection]
            return connection
        host.open += 1
        host.opening[errand] = now
        host.pace.opens(now)
        return None

    def wake_at(self, host: Host, at: float) -> None:
        if host.timer is not None:
            if host.timer_at <= at:
                return
            host.timer.cancel()
        host.timer_at = at
        host.timer = self._loop.call_later(max(0.0, at - monotonic()), self._timed, host)

    def _timed(self, host: Host) -> None:
        host.timer = None
        self.wake(host)

    # Trouble.

    def answered(self, host: Host) -> None:
        """A sign of life."""
        host.failures = 0
        if host.down_since is not None:
            host.down_since = None
            self.cooling.discard(host)

    def failed(self, host: Host) -> None:
        """No sign of life. After several in a row the host is left alone, then probed once, and so on."""
        host.failures += 1
        if host.failures < self._host_failures:
            return
        now = monotonic()
        if host.resting_until > now:
            return
        if host.down_since is None:
            host.down_since = now
            self.cooling.add(host)
        self._rest(host, now + self._cooldown_s, HOST_DOWN)

    def forgive(self, host: Host) -> None:
        """Its failures were ours."""
        host.failures = 0
        if host.down_since is not None:
            host.down_since = None
            self.cooling.discard(host)
            host.resting_until = 0.0
        self.wake(host)

    def leave_alone(self, host: Host, seconds: float, reason: str) -> None:
        """The host asked for it."""
        until = monotonic() + seconds
        if until > host.resting_until:
            self._rest(host, until, reason)

    def _rest(self, host: Host, until: float, reason: str) -> None:
        since = max(host.resting_until, monotonic())
        host.resting_until, host.rest_reason = until, reason
        for waiter in list(host.waiting):
            try:
                self._be_patient(host, waiter.errand, since)
            except HostGone as gone:
                host.waiting.remove(waiter)
                self.waiting -= 1
                if not waiter.turn.done():
                    waiter.turn.set_exception(gone)
        if host.limited and reason != HOST_DOWN:
            self._gave_back(host)  # the other workers learn of it with what we no longer want
        if host.waiting:
            self.wake_at(host, until)

    def _be_patient(self, host: Host, errand: Errand, since: float) -> None:
        """A row waits only where its patience lasts until the next contact."""
        if host.down_since is not None:
            if host.resting_until > host.down_since + self._patience_s:
                raise HostGone(host.rest_reason)
        else:
            errand.patience_s -= host.resting_until - since
            if errand.patience_s < 0:
                raise HostGone(host.rest_reason)

    def fail_all(self, hosts: Iterable[Host], error: Exception) -> None:
        """Nobody's turn will come any more."""
        self._error = error
        for host in hosts:
            while host.waiting:
                waiter = host.waiting.popleft()
                self.waiting -= 1
                if not waiter.turn.done():
                    waiter.turn.set_exception(error)

    # Kept connections.

    def close_idle(self, host: Host) -> None:
        for connection in list(host.idle):
            self._close_idle(connection)

    def close_one_idle(self, host: Host) -> None:
        self._close_idle(host.idle[0])

    def sweep(self) -> None:
        """Close what has been idle for long."""
        now = monotonic()
        while self._idle:
            connection, (_, since) = next(iter(self._idle.items()))
            if now - since < _IDLE_S:
                return
            self._close_idle(connection)

    def close(self) -> None:
        for connection in list(self._idle):
            self._close_idle(connection)

    def _close_idle(self, connection: Connection) -> None:
        self._lost(connection)
        connection.close()

    def _lost(self, connection: Connection) -> None:
        """An idle connection is gone."""
        kept = self._idle.pop(connection, None)
        if kept is None:
            return
        host, _ = kept
        host.idle.remove(connection)
        host.open -= 1
        if not host.busy:
            self._gave_back(host)
        self.wake(host)
