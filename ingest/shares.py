"""A worker's side of `HostLimits`: what it holds of each host, and the batched exchange that changes it.

One exchange is on its way at a time. Hosts that need something meanwhile go with the next one, so that under load a
single call speaks for hundreds of hosts, and an idle worker is answered at once.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from math import inf
from time import monotonic
from typing import Any

from cluster.errors import WorkFailed
from ingest.host import LATE_S, Host
from ingest.limits import Ask, Demand, Reply

log = logging.getLogger(__name__)

# How soon a host that got too little asks again.
_AGAIN_S = 0.1
_RETRY_S = 1.0
_UNREACHABLE_S = 120.0


class Shares:
    """`granted(host)` is called when a host got something, `rests(host, seconds, reason)` when another worker was told
    to leave it alone, `broken(error)` when the limits cannot be reached any more."""

    def __init__(
        self,
        ask: Ask,
        worker: str,
        *,
        most_connections: int,
        deadline_s: float,
        state: Callable[[], dict[str, Any]],
        granted: Callable[[Host], None],
        rests: Callable[[Host, float, str], None],
        broken: Callable[[Exception], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._ask = ask
        self._worker = worker
        self._most_connections = most_connections
        self._deadline_s = deadline_s
        self._margin_s = 0.0
        self._renew_s = 1.0
        self._state = state
        self._granted = granted
        self._rests = rests
        self._broken = broken
        self._dirty: dict[Host, None] = {}
        self._held: set[Host] = set()
        self._again: set[Host] = set()
        self._asked: dict[Host, Demand] | None = None
        self._scheduled = self._closed = False
        self._failing_since: float | None = None

    def may_ask(self, host: Host, now: float) -> float:
        """When a request may go to a limited host: not after now, then, or for ever where `granted` will follow."""
        grant = host.grant
        has_connection = bool(host.idle) or host.open < grant.connections
        # A request ends within the deadline: none begins that could outlive the lease of its connection.
        if not has_connection and host.open >= self._most_connections and grant.until - self._margin_s > now:
            return inf  # there are no more to be had: the end of a turn wakes the host
        next_place = grant.next_place(now)
        if not has_connection or grant.until - self._margin_s <= now or next_place == inf:
            if host not in self._again and (self._asked is None or host not in self._asked):
                self.exchange_soon(host)
            return inf
        return next_place

    def exchange_soon(self, host: Host) -> None:
        self._dirty[host] = None
        self._schedule()

    def tick(self) -> None:
        """About once a second: leases are renewed, what is not needed is given back, and our state is told."""
        now = monotonic()
        for host in list(self._held):
            if not host.busy or host.grant.until - now < self._renew_s:
                self._dirty[host] = None
        self._schedule()

    def close(self) -> None:
        """Everything is given back; nobody waits for the answer."""
        self._closed = True
        if self._failing_since is None:
            self._ask("exchange", self._worker, {host.key: (0, 0, 0, 0, 0.0, "") for host in self._held}, {})

    def _schedule(self) -> None:
        if not self._scheduled and self._asked is None and not self._closed:
            self._scheduled = True
            self._loop.call_soon(self._exchange)

    def _exchange(self) -> None:
        self._scheduled = False
        if self._asked is not None or self._closed:
            return
        self._asked = {host: self._demand(host) for host in self._dirty}
        self._dirty.clear()
        started = monotonic()
        demand = {host.key: asked for host, asked in self._asked.items()}
        try:
            answer = self._ask("exchange", self._worker, demand, self._state())
        except Exception as error:
            answer = Future()
            answer.set_exception(error)
        if answer.done():
            self._received(started, answer)
        else:
            answer.add_done_callback(lambda done: self._loop.call_soon_threadsafe(self._received, started, done))

    def _demand(self, host: Host) -> Demand:
        now = monotonic()
        if not host.busy:
            host.grant.connections = 0  # given up before it is said, so that one exchange is enough
        waiting = len(host.waiting)
        wanted = min(self._most_connections, host.in_flight + waiting)
        rest_s = max(0.0, host.resting_until - now) if host.down_since is None else 0.0
        requests = 0 if rest_s else waiting - sum(left for _, left in host.grant.places)
        return (host.grant.connections, host.open, wanted, max(0, requests), rest_s, host.rest_reason)

    def _received(self, started: float, answer: "Future[Any]") -> None:
        asked, self._asked = self._asked or {}, None
        if self._closed:
            return
        error = answer.exception()
        if error is not None:
            self._dirty.update(dict.fromkeys(asked))
            self._failed(error)
            return
        self._failing_since = None
        replies: dict[str, Reply] = answer.result()
        for host, demand in asked.items():
            self._apply(host, demand, replies[host.key], started)
        if self._again:
            self._loop.call_later(_AGAIN_S, self._ask_again)
        if self._dirty:
            self._schedule()

    def _apply(self, host: Host, demand: Demand, reply: Reply, started: float) -> None:
        connections, requests, start_in_s, spacing_s, rest_s, rest_reason, lease_s = reply
        self._margin_s, self._renew_s = min(self._deadline_s, lease_s / 2), lease_s * 0.75
        grant = host.grant
        grant.connections, grant.until = connections, started + lease_s
        if requests:
            grant.spacing_s = spacing_s
            grant.places.append((monotonic() + start_in_s, requests))
        if connections or host.open:
            self._held.add(host)
        else:
            self._held.discard(host)
        if rest_s > demand[4] + LATE_S:
            self._rests(host, rest_s, rest_reason)
        if host.waiting and not rest_s and (not connections or not requests):
            self._again.add(host)
        self._granted(host)

    def _ask_again(self) -> None:
        again, self._again = self._again, set()
        for host in again:
            if host.waiting:
                self._granted(host)

    def _failed(self, error: BaseException) -> None:
        now = monotonic()
        if self._failing_since is None:
            self._failing_since = now
            log.warning("the hosts' shared limits cannot be reached (%r); asking again", error)
        if now - self._failing_since > _UNREACHABLE_S:
            self._broken(
                WorkFailed(f"the hosts' shared limits cannot be reached for {_UNREACHABLE_S:.0f} s: {error!r}")
            )
        else:
            self._loop.call_later(_RETRY_S, self._schedule)
