"""robots.txt of each host (RFC 9309): fetched once, under the same guard as everything, and remembered.

200            its rules, for the agent `unclip`; what is beyond 500 KB is not read
4xx            there are no rules: everything may be fetched (429 is not such an answer)
5xx, or none   nothing may be fetched: rows end as `robots_unavailable`, or with what the network said, and may be
               asked again after a while
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from protego import Protego
from yarl import URL

from ingest.address import Refused
from ingest.answer import FetchFailed

AGENT = "unclip"
MAX_BYTES = 500_000

_REMEMBER_S = 86_400.0
_REMEMBERED_HOSTS = 20_000
_REMEMBERED_BYTES = 32_000_000
_NO_RULES = frozenset({"too_many_redirects", "bad_redirect"})
_NETWORK = frozenset({"dns", "tls", "connection_failed", "connection_cut", "deadline", "host_down"})


@dataclass(frozen=True, slots=True)
class _Known:
    """`rules` is None where everything is allowed; `failure` says why nothing is."""

    rules: Protego | None
    failure: FetchFailed | None
    size: int
    until: float


class Robots:
    """`fetch(url)` gives the file's bytes; it raises `FetchFailed` or `Refused`."""

    def __init__(self, fetch: Callable[[URL], Awaitable[bytes]], remember_failure_s: float) -> None:
        self._fetch = fetch
        self._remember_failure_s = remember_failure_s
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._asking: dict[str, asyncio.Task[_Known]] = {}
        self._bytes = 0

    async def check(self, origin: str, url: URL) -> None:
        """Raises `Refused` where the rules forbid the URL, `FetchFailed` where they cannot be had."""
        known = self._known.get(origin)
        if known is None or time.monotonic() > known.until:
            known = await self._asked(origin, url)
        elif known.failure is not None and known.failure.reason in _NETWORK:
            raise FetchFailed("host_down", may_pass=False)
        if known.failure is not None:
            raise FetchFailed(known.failure.reason, may_pass=False, attempts=known.failure.attempts)
        if known.rules is not None and not known.rules.can_fetch(str(url), AGENT):
            raise Refused("robots_txt")

    async def _asked(self, origin: str, url: URL) -> _Known:
        task = self._asking.get(origin)
        if task is None:
            task = self._asking[origin] = asyncio.create_task(self._ask(origin, url.join(URL("/robots.txt"))))
            task.add_done_callback(
                lambda ended: (self._asking.pop(origin, None), ended.cancelled() or ended.exception())
            )
        # Shielded: the rows of the host share the answer, and one row's end must not take it from the others.
        return await asyncio.shield(task)

    async def _ask(self, origin: str, url: URL) -> _Known:
        rules, failure, size, remember_s = None, None, 0, _REMEMBER_S
        try:
            text = (await self._fetch(url)).decode("utf-8", "replace")
            if text.strip():
                rules, size = Protego.parse(text), len(text)
        except FetchFailed as failed:
            client_error = failed.reason.startswith("http_4") and failed.reason != "http_429"
            if not client_error and failed.reason not in _NO_RULES:
                reason = failed.reason if failed.reason in _NETWORK else "robots_unavailable"
                failure = FetchFailed(reason, may_pass=False, attempts=failed.attempts)
                remember_s = self._remember_failure_s
        except Refused:
            failure, remember_s = FetchFailed("robots_unavailable", may_pass=False), self._remember_failure_s
        known = _Known(rules, failure, size, time.monotonic() + remember_s)
        self._forget(origin)
        self._known[origin] = known
        self._bytes += size
        while len(self._known) > _REMEMBERED_HOSTS or (self._bytes > _REMEMBERED_BYTES and len(self._known) > 1):
            self._forget(next(iter(self._known)))
        return known

    def _forget(self, origin: str) -> None:
        known = self._known.pop(origin, None)
        if known is not None:
            self._bytes -= known.size

    def close(self) -> None:
        for task in list(self._asking.values()):
            task.cancel()
