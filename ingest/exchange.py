"""One request to one host: a turn, a connection, an answer, and what they say about the host's pace."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic

from yarl import URL

from ingest.answer import Answer, Caps, FetchFailed, Stale
from ingest.budget import ByteBudget
from ingest.connection import GRACE_S, Connection
from ingest.dial import dial
from ingest.fetch_config import FetchConfig
from ingest.host import Errand, Host
from ingest.turns import Turns

# Of the deadline, for one try to connect: a dropped SYN is sent again after 1 and 3 seconds.
_CONNECT_SHARE = 0.4


@asynccontextmanager
async def patience(seconds: float) -> AsyncIterator[None]:
    """A timeout that does not count what this process kept itself from hearing: after it, what has come in is read.

    A loop that stood still runs its timers first, and would give up connections that have long been made.
    """
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as scope:
        timer = loop.call_later(seconds, lambda: scope.reschedule(loop.time() + GRACE_S))
        try:
            yield
        finally:
            timer.cancel()


class Exchanges:
    """Makes requests under one config."""

    def __init__(self, config: FetchConfig, turns: Turns, budget: ByteBudget, tls: ssl.SSLContext) -> None:
        self._config = config
        self._turns = turns
        self._budget = budget
        self._tls = tls
        self._proxy = None if config.proxy is None else URL(config.proxy)
        self._headers = (
            f"User-Agent: {config.user_agent}\r\nAccept: image/*,*/*;q=0.1\r\nAccept-Encoding: identity\r\n\r\n"
        )

    async def get(self, errand: Errand, host: Host, url: URL, caps: Caps) -> Answer:
        """The answer, whatever it says. Raises `FetchFailed` where no connection came to be, and what a turn raises."""
        request = f"GET {url.raw_path_qs} HTTP/1.1\r\nHost: {host.label}\r\n{self._headers}".encode("ascii")
        while True:
            answer = await self._ask(errand, host, request, caps)
            if not isinstance(answer.failure, Stale):
                return answer
            answer.drop()
            # Nothing reached the server: that was no attempt. Its other kept connections are no fresher.
            self._turns.close_idle(host)

    async def _ask(self, errand: Errand, host: Host, request: bytes, caps: Caps) -> Answer:
        assert host.resolved is not None
        connection = await self._turns.turn(host, errand)
        answer = Answer(caps, self._budget)
        try:
            if connection is not None and connection.address not in host.resolved.addresses:
                connection.close()
                connection = None
            if errand.left_s <= 0:
                raise FetchFailed("deadline", may_pass=False)
            if connection is None:
                connection = await self._opened(errand, host)
            asked_at = monotonic()
            await connection.ask(request, answer, max(0.0, errand.left_s))
            errand.left_s = connection.deadline_at - monotonic()
            self._heed(host, answer)
            if connection.first_byte_at:
                if errand in host.opening:
                    host.pace.first_answer(host.opening[errand], connection.first_byte_at)
                waited_s = connection.first_byte_at - asked_at
                host.pace.answered(waited_s, connection.first_byte_at, self._config.concurrency)
            return answer
        except FetchFailed as failure:
            if failure.network:
                self._turns.failed(host)
            raise
        except asyncio.CancelledError:
            if connection is not None:
                connection.give_up()
            answer.drop()
            raise
        finally:
            self._turns.done(host, errand, connection)

    def _heed(self, host: Host, answer: Answer) -> None:
        """What the answer says of its host. Before the turn ends: the next one must not begin against its wish."""
        if not answer.status:
            if isinstance(answer.failure, FetchFailed) and answer.failure.network:
                self._turns.failed(host)
            return
        self._turns.answered(host)
        if answer.status in (429, 503):
            host.pace.rejected()
            seconds = answer.retry_after_s
            if seconds is None and answer.status == 429:
                seconds = self._config.backoff_s
            if seconds is not None:
                self._turns.leave_alone(host, seconds, f"http_{answer.status}")

    async def _opened(self, errand: Errand, host: Host) -> Connection:
        assert host.resolved is not None
        addresses = host.resolved.addresses
        started = monotonic()
        try:
            async with patience(min(errand.left_s, self._config.deadline_s * _CONNECT_SHARE)):
                connection = await dial(
                    lambda: Connection(self._config.min_rate_after_s, self._config.min_bytes_per_s),
                    addresses[host.address % len(addresses)],
                    host.port,
                    name=host.name,
                    tls=self._tls if host.scheme == "https" else None,
                    proxy=self._proxy,
                )
        except ssl.SSLError:
            raise FetchFailed("tls", may_pass=False) from None
        except (TimeoutError, OSError):
            host.address += 1
            host.pace.troubled(monotonic())
            raise FetchFailed("connection_failed", may_pass=True, network=True) from None
        finally:
            errand.left_s -= monotonic() - started
        return connection
