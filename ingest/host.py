"""What is known of one host (scheme, name and port) while rows of it are on their way."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf

from yarl import URL

from ingest.connection import Connection
from ingest.pace import Pace
from ingest.resolver import Resolved

_REMEMBERED = 20_000
_LOOKED_AT = 64
LATE_S = 0.1


class HostGone(Exception):
    """The row's patience ends before the host may be contacted again. `reason` says why it may not."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(slots=True, eq=False)
class Errand:
    """One URL on its way, over all its attempts and hops.

    left_s        of its deadline: only what the web takes is counted
    patience_s    of its waiting for hosts that asked to be left alone
    """

    left_s: float
    patience_s: float
    attempts: int = 0


@dataclass(slots=True, eq=False)
class Waiter:
    turn: "asyncio.Future[Connection | None]"
    errand: Errand


@dataclass(slots=True, eq=False)
class Grant:
    """What this worker may do to a host that is limited over all workers (`ingest/limits.py`).

    `places` are runs of places on the host's time line: when the next of the run is, and how many it has left. A place
    may be used late, but not by much: after that it is lost, so that what was held up does not come in a burst.
    """

    connections: int = 0
    until: float = 0.0
    spacing_s: float = 0.0
    places: deque[tuple[float, int]] = field(default_factory=deque)

    def next_place(self, now: float) -> float:
        """When the next request may go: not after now, then, or for ever where there is no place left."""
        while self.places:
            at, left = self.places[0]
            lost = 0 if now - at <= LATE_S else int((now - LATE_S - at) / self.spacing_s) + 1
            if lost < left:
                self.places[0] = (at + lost * self.spacing_s, left - lost)
                return self.places[0][0]
            self.places.popleft()
        return inf

    def use_place(self) -> None:
        at, left = self.places[0]
        self.places[0] = (at + self.spacing_s, left - 1)


@dataclass(slots=True, eq=False)
class Host:
    """`open` counts connections, idle and new ones too; `opening` are the new ones, which have not answered yet."""

    scheme: str
    name: str
    port: int
    limited: bool = True
    waiting: deque[Waiter] = field(default_factory=deque)
    idle: list[Connection] = field(default_factory=list)
    open: int = 0
    opening: dict[Errand, float] = field(default_factory=dict)
    in_flight: int = 0
    pace: Pace = field(default_factory=Pace)
    grant: Grant = field(default_factory=Grant)
    queued: bool = False
    timer: asyncio.TimerHandle | None = None
    timer_at: float = 0.0
    # Trouble: failures in a row; since when it is down; until when it is left alone, and the ledger's word for why.
    failures: int = 0
    down_since: float | None = None
    resting_until: float = 0.0
    rest_reason: str = ""
    rests: int = 0
    known_good: bool = False
    # Checked addresses, and which of them is tried next.
    resolved: Resolved | None = None
    address: int = 0

    @property
    def key(self) -> str:
        return f"{self.scheme}://{self.label}"

    @property
    def label(self) -> str:
        """As people name it: without the scheme's usual port."""
        name = f"[{self.name}]" if ":" in self.name else self.name
        return name if self.port == (443 if self.scheme == "https" else 80) else f"{name}:{self.port}"

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.open or self.in_flight or self.queued)


class KnownHosts:
    """The hosts seen lately, in bounded memory. A busy one is never forgotten; one that rests, for want of room."""

    def __init__(self) -> None:
        self._hosts: OrderedDict[tuple[str, str, int], Host] = OrderedDict()

    def of(self, url: URL, now: float) -> Host:
        assert url.raw_host is not None and url.port is not None, "check_url lets no other URL through"
        key = (url.scheme, url.raw_host, url.port)
        host = self._hosts.get(key)
        if host is None:
            host = self._hosts[key] = Host(*key)
            if len(self._hosts) > _REMEMBERED:
                self._forget(now)
        else:
            self._hosts.move_to_end(key)
        return host

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts.values())

    def _forget(self, now: float) -> None:
        for _ in range(_LOOKED_AT):
            key, host = next(iter(self._hosts.items()))
            resting = host.resting_until > now and len(self._hosts) < 5 * _REMEMBERED
            if not host.busy and host.grant.connections == 0 and not resting:
                del self._hosts[key]
                if host.timer is not None:
                    host.timer.cancel()
                if len(self._hosts) <= _REMEMBERED:
                    return
            else:
                self._hosts.move_to_end(key)
