"""Was it them, or was it us? A failure is a host's own only once the network is known to work.

A failure at the level of the network (no name server, no connection, no byte) is charged to its host when anything
answers after it. When many hosts have failed and nothing has answered since, hosts that were good are asked; if they
fail too, or none is known, it is our outage: fetching pauses, the failures since the last answer are charged to
nobody, and their rows are asked again when a host answers.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from time import monotonic

from cluster.errors import WorkFailed
from ingest.host import Host

log = logging.getLogger(__name__)

MANY_HOSTS = 16
# A failure is charged after this long although nothing answered, where too few hosts failed to call it an outage.
_IN_DOUBT_S = 2.0
_GOOD_HOSTS = 64
_PROBED = 3
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0

Probe = Callable[[Host], Awaitable[bool]]


class Outage:
    """`probe(host)` says whether a host can be connected to, `active()` how many attempts have not ended."""

    def __init__(
        self,
        *,
        patience_s: float,
        probe: Probe,
        active: Callable[[], int],
        paused: Callable[[], None],
        resumed: Callable[[list[Host]], None],
        broken: Callable[[Exception], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._patience_s = patience_s
        self._probe = probe
        self._active = active
        self._paused = paused
        self._resumed = resumed
        self._broken = broken
        self._good: OrderedDict[Host, None] = OrderedDict()
        self._failed: dict[Host, None] = {}
        self._in_doubt: dict[asyncio.Future[bool], float] = {}
        self._judging: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._error: Exception | None = None
        self.since: float | None = None

    def answered(self, host: Host) -> None:
        """A sign of life from anywhere: the network works, and what failed before was them."""
        if not host.known_good:
            host.known_good = True
            self._good[host] = None
            if len(self._good) > _GOOD_HOSTS:
                self._good.popitem(last=False)[0].known_good = False
        if self._failed or self._in_doubt:
            if self.since is None:
                self._charge_all()
            else:
                self._end()

    async def is_theirs(self, host: Host) -> bool:
        """Whether the failure is the host's own. Returns when that is known; False means ask again."""
        if self._error is not None:
            raise self._error
        self._failed[host] = None
        doubt: asyncio.Future[bool] = self._loop.create_future()
        self._in_doubt[doubt] = monotonic() + _IN_DOUBT_S
        if len(self._failed) >= MANY_HOSTS and self._judging is None:
            self._judging = self._loop.create_task(self._judge())
        elif self._judging is None:
            self._loop.call_soon(self._look)
        try:
            return await doubt
        finally:
            self._in_doubt.pop(doubt, None)

    def _look(self) -> None:
        """Charge what has been in doubt for long, or all if nothing is left that could tell."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._judging is not None or not self._in_doubt:
            return
        now = monotonic()
        if self._active() <= len(self._in_doubt):
            self._resolve(list(self._in_doubt), theirs=True)
            return
        self._resolve([doubt for doubt, at in self._in_doubt.items() if at <= now], theirs=True)
        if self._in_doubt:
            self._timer = self._loop.call_later(0.05, self._look)

    async def _judge(self) -> None:
        try:
            suspects = list(self._failed)
            witnesses = list(self._good)[-_PROBED:]
            if witnesses and await self._any_answers(witnesses):
                self._charge_all()
                return
            if not self._failed:
                return
            self._begin(len(suspects), bool(witnesses))
            pause_s = _FIRST_PAUSE_S
            while self.since is not None:
                if monotonic() - self.since > self._patience_s:
                    self._broken(self._too_long())
                    return
                await asyncio.sleep(min(pause_s, max(0.01, self.since + self._patience_s - monotonic())))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                failed = list(self._failed)
                if await self._any_answers([*list(self._good)[-_PROBED:], *failed[:2], *failed[-1:]]):
                    self._end()
        finally:
            if self._judging is asyncio.current_task():
                self._judging = None
            if self._in_doubt:
                self._look()

    def _too_long(self) -> WorkFailed:
        names = ", ".join(sorted(host.label for host in list(self._failed)[:3]))
        return WorkFailed(
            f"no host has answered for {self._patience_s:.0f} s: {len(self._failed)} failed, {names} among them. "
            "Look at this machine's network and name server, then start the run again: it goes on where it stopped "
            "(images.outage_patience_s says how long to wait)."
        )

    async def _any_answers(self, hosts: list[Host]) -> bool:
        asked = [asyncio.ensure_future(self._probe(host)) for host in hosts]
        try:
            for answer in asyncio.as_completed(asked):
                if await answer:
                    return True
            return False
        finally:
            for probe in asked:
                probe.cancel()

    def _begin(self, suspects: int, witnessed: bool) -> None:
        self.since = monotonic()
        known = "hosts that answered before fail too" if witnessed else "none has answered yet"
        log.warning(
            "outage: %d hosts failed one after another and %s; fetching pauses until one answers", suspects, known
        )
        self._paused()

    def _end(self) -> None:
        assert self.since is not None
        log.warning("outage over after %.0f s: fetching goes on", monotonic() - self.since)
        self.since = None
        if self._judging is not None and self._judging is not asyncio.current_task():
            self._judging.cancel()
            self._judging = None
        forgiven = list(self._failed)
        self._failed.clear()
        self._resolve(list(self._in_doubt), theirs=False)
        self._resumed(forgiven)

    def _charge_all(self) -> None:
        self._failed.clear()
        self._resolve(list(self._in_doubt), theirs=True)

    def _resolve(self, doubts: "list[asyncio.Future[bool]]", *, theirs: bool) -> None:
        for doubt in doubts:
            self._in_doubt.pop(doubt, None)
            if not doubt.done():
                doubt.set_result(theirs)

    def close(self, error: Exception | None = None) -> None:
        """Nobody learns any more whose failure it was."""
        self._error = error
        for task in (self._judging, self._timer):
            if task is not None:
                task.cancel()
        for doubt in list(self._in_doubt):
            if error is not None and not doubt.done():
                doubt.set_exception(error)
            else:
                doubt.cancel()
        self._in_doubt.clear()
