"""The limits of a host over all workers: one object that hands out shares, in a process that all of them can ask.

    worker ──exchange(what it holds, what it wants)──► HostLimits ──► what it may hold from now on

A share is a number of connections, for a lease, and a number of requests, for exact times: the requests of a host lie
on one time line, and nobody gets a place on it twice. What a worker holds is charged until the worker itself has said
that it holds less (it may still act on an earlier answer), or until its lease has ended; so the sum over all workers
is never above the limit, whoever dies. Workers that want more than there is take turns of a second.

Every argument and result is plain data: numbers and strings in tuples and dicts.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

Demand = tuple[int, int, int, int, float, str]
Reply = tuple[int, int, float, float, float, str, float]
Ask = Callable[..., "Future[Any]"]

_TURN_S = 1.0
# Requests are handed out for the next second at most, so that a new worker does not wait long for its place.
_AHEAD_S = 1.0
_NAMED_HOSTS = 20


@dataclass(slots=True)
class _Share:
    """`charged`: connections that the worker may have open by now. `served`: when its turn began."""

    charged: int = 0
    target: int = 0
    wanted: int = 0
    until: float = 0.0
    served: float = float("-inf")


@dataclass(slots=True)
class _Host:
    shares: dict[str, _Share] = field(default_factory=dict)
    next_at: float = 0.0
    resting_until: float = 0.0
    rest_reason: str = ""


class HostLimits:
    """`clock` is for tests; everything else is `limits_settings` of the config."""

    def __init__(
        self,
        *,
        connections_per_host: int,
        requests_per_s_per_host: float,
        lease_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connections = connections_per_host
        self._rate = requests_per_s_per_host
        self._lease_s = lease_s
        self._clock = clock
        self._hosts: dict[str, _Host] = {}
        self._states: dict[str, tuple[float, dict[str, Any]]] = {}
        self._swept_at = clock()
        self._lock = threading.Lock()

    def exchange(self, worker: str, demand: dict[str, Demand], state: dict[str, Any]) -> dict[str, Reply]:
        """By host: (cap, open, wanted, requests, rest_s, rest_reason) → (cap, requests, start_in_s, spacing_s, rest_s,
        rest_reason, lease_s).

        cap       connections that the worker may have, as of the last reply that reached it
        open      connections that it has; wanted: that it could use
        requests  that wait to be sent; of the reply: how many may go, from when, how far apart
        rest_s    how long the host asked to be left alone
        lease_s   how long the reply holds, from when it was asked for
        """
        with self._lock:
            now = self._clock()
            self._states[worker] = (now, state)
            if now - self._swept_at > self._lease_s / 2:
                self._sweep(now)
            return {name: self._answer(worker, name, asked, now) for name, asked in demand.items()}

    def report(self) -> dict[str, Any]:
        """What the workers said of themselves last."""
        with self._lock:
            now = self._clock()
            states = [state for at, state in self._states.values() if now - at < self._lease_s]
        outages = [state["outage"] for state in states if state.get("outage")]
        cooling = sorted({host for state in states for host in state.get("cooling", ())})
        return {
            "outage": outages[0] if outages else False,
            "in_flight": sum(state.get("in_flight", 0) for state in states),
            "waiting": sum(state.get("waiting", 0) for state in states),
            "cooling": cooling[:_NAMED_HOSTS],
        }

    def _answer(self, worker: str, name: str, asked: Demand, now: float) -> Reply:
        cap, opened, wanted, requests, rest_s, rest_reason = asked
        host = self._hosts.get(name)
        if host is None:
            host = self._hosts[name] = _Host()
        if rest_s > 0 and now + rest_s > host.resting_until:
            host.resting_until, host.rest_reason = now + rest_s, rest_reason
        share = host.shares.get(worker)
        if share is None:
            share = host.shares[worker] = _Share()
        for other in [key for key, held in host.shares.items() if held.until < now and held is not share]:
            del host.shares[other]
        share.charged, share.wanted, share.until = max(cap, opened), wanted, now + self._lease_s
        target = self._target(host, share, now)
        if not (target or cap or opened or wanted):
            del host.shares[worker]
            if not host.shares and max(host.next_at, host.resting_until) <= now:
                del self._hosts[name]
            return (0, 0, 0.0, 0.0, max(0.0, host.resting_until - now), host.rest_reason, self._lease_s)
        if target and not share.target:
            share.served = now
        share.target = target
        share.charged = max(share.charged, target)
        granted, start_in_s = self._requests(host, requests if target else 0, now)
        return (
            target,
            granted,
            start_in_s,
            1 / self._rate,
            max(0.0, host.resting_until - now),
            host.rest_reason,
            self._lease_s,
        )

    def _target(self, host: _Host, share: _Share, now: float) -> int:
        others = [held for held in host.shares.values() if held is not share]
        free = self._connections - sum(held.charged for held in others)
        hungry = [held for held in host.shares.values() if held.wanted]
        if len(hungry) <= 1:
            # Alone, a worker keeps what it has open although it needs less just now.
            fair = self._connections
            wanted = max(share.wanted, min(share.charged, fair)) if share.wanted else 0
        else:
            hungry.sort(key=lambda held: _place(held, now))
            each, rest = divmod(self._connections, len(hungry))
            fair = each + (hungry.index(share) < rest if share.wanted else 0)
            # What the others leave of their fair shares is free for all.
            spare = self._connections - sum(min(held.wanted, each) for held in hungry)
            satisfied = all(held.wanted <= each for held in hungry if held is not share)
            fair = max(fair, min(share.wanted, each) + spare) if satisfied else fair
            wanted = share.wanted
        return max(0, min(wanted, fair, free))

    def _requests(self, host: _Host, wanted: int, now: float) -> tuple[int, float]:
        start = max(now, host.next_at)
        hungry = max(1, sum(1 for held in host.shares.values() if held.wanted))
        if not wanted or start - now > _AHEAD_S:
            return 0, max(0.0, start - now - _AHEAD_S)
        granted = min(wanted, max(1, int(self._rate * _AHEAD_S / hungry)))
        host.next_at = start + granted / self._rate
        return granted, start - now

    def _sweep(self, now: float) -> None:
        self._swept_at = now
        for name, host in list(self._hosts.items()):
            for worker in [worker for worker, held in host.shares.items() if held.until < now]:
                del host.shares[worker]
            if not host.shares and max(host.next_at, host.resting_until) <= now:
                del self._hosts[name]
        for worker in [worker for worker, (at, _) in self._states.items() if now - at > self._lease_s]:
            del self._states[worker]


def _place(share: _Share, now: float) -> tuple[int, float]:
    """Who is in their turn keeps it; then comes who was served the longest ago."""
    in_turn = share.target > 0 and now - share.served < _TURN_S
    return (0 if in_turn else 1, share.served)


def limits_settings(connections_per_host: int, requests_per_s_per_host: float, deadline_s: float) -> dict[str, Any]:
    """Arguments of `HostLimits`. A lease outlives every request that was begun under it, with time to renew it."""
    return {
        "connections_per_host": connections_per_host,
        "requests_per_s_per_host": requests_per_s_per_host,
        "lease_s": 2 * deadline_s + 10.0,
    }


def local_ask(limits: HostLimits) -> Ask:
    """Asks an object of this process: for one worker alone."""

    def ask(method: str, *args: Any) -> "Future[Any]":
        answer: Future[Any] = Future()
        try:
            answer.set_result(getattr(limits, method)(*args))
        except Exception as error:
            answer.set_exception(error)
        return answer

    return ask
