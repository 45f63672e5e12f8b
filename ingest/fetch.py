"""The guarded fetch: one URL in, its bytes or the reason why not.

    check the URL ──► resolve and check addresses ──► robots.txt ──► a turn ──► connection ──► answer
          ▲                                                                                     │
          └──────────────────── every redirect hop is a new request under the full guard ───────┘

One deadline covers all attempts and hops of a URL; what waits for our own sake (a turn, room for bytes, a host that
asked to be left alone) is not counted. What may pass (429, 5xx, resets, timeouts, cut bodies) is tried again with
backoff; what will not is not.

The proxy settings of the environment are ignored, there are no cookies, and nothing is sent but an honest User-Agent.
"""

import asyncio
import logging
import random
import resource
import ssl
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from time import monotonic
from types import TracebackType
from typing import Any, Self

from yarl import URL

from ingest.address import AddressPolicy, Refused
from ingest.answer import Answer, Caps, FetchFailed
from ingest.budget import ByteBudget
from ingest.exchange import Exchanges
from ingest.fetch_config import FetchConfig
from ingest.host import Errand, Host, HostGone, KnownHosts
from ingest.inflate import TooLarge, UnknownEncoding
from ingest.limits import Ask, HostLimits, limits_settings, local_ask
from ingest.outage import Outage
from ingest.outcome import Status
from ingest.resolver import LookUp, Resolver, Unresolvable, system_look_up
from ingest.robots import MAX_BYTES, Robots
from ingest.shares import Shares
from ingest.turns import MOST_IDLE, Turns

log = logging.getLogger(__name__)

MAX_REDIRECTS = 5
_PROBE_S = 5.0
_SPARE_FILES = MOST_IDLE + 256


@dataclass(frozen=True)
class Fetched:
    """`body` where the fetch succeeded; else `status` (fetch_failed or refused) and `reason`.

    `host` is the host of the URL as people name it, "" where the URL has none that could be fetched from.
    """

    body: bytes | None
    status: Status = Status.OK
    reason: str | None = None
    attempts: int = 1
    host: str = ""


class NotCharged(Exception):
    """The attempt failed through our own outage."""


class Fetching:
    """`async with fetcher.fetched(url) as fetched`: the body's bytes are charged to the budget until the block ends."""

    __slots__ = ("_answer", "_fetcher", "_url")

    def __init__(self, fetcher: "Fetcher", url: str) -> None:
        self._fetcher = fetcher
        self._url = url
        self._answer: Answer | None = None

    async def __aenter__(self) -> Fetched:
        fetched, self._answer = await self._fetcher._fetch(self._url)
        return fetched

    async def __aexit__(self, *_: object) -> None:
        if self._answer is not None:
            self._answer.drop()


class Fetcher:
    """Fetches any number of URLs at a time on the running event loop; an async context manager.

    `ask` reaches the `HostLimits` that all workers share; without it this one is alone. `look_up` and `trust` stand
    in for the machine's resolver and its certificate authorities.
    """

    def __init__(
        self,
        config: FetchConfig,
        ask: Ask | None = None,
        *,
        look_up: LookUp = system_look_up,
        trust: ssl.SSLContext | None = None,
    ) -> None:
        self._config = config
        limits = limits_settings(config.connections_per_host, config.requests_per_s_per_host, config.deadline_s)
        self._ask = ask or local_ask(HostLimits(**limits))
        self._look_up = look_up
        self._tls = trust or ssl.create_default_context()
        self._policy = AddressPolicy(config.allow_networks, config.ports)
        self._caps = Caps(config.max_bytes, config.max_decompressed_bytes, config.respect_robots_tag)
        self._robots_caps = Caps(MAX_BYTES, MAX_BYTES, respect_robots_tag=False, cut=True)
        self._stopped: Exception | None = None
        self._active = 0  # attempts under way, those whose failure is in doubt too

    async def __aenter__(self) -> Self:
        config = self._config
        self._loop = asyncio.get_running_loop()
        self._unfolding = ThreadPoolExecutor(1, thread_name_prefix="unfold")  # one bomb's memory at a time
        self._hosts = KnownHosts()
        self._resolver = Resolver(self._policy, self._look_up, timeout_s=config.deadline_s)
        self._robots = Robots(self._robots_txt, config.host_cooldown_s)
        self._budget = ByteBudget(config.buffered_bytes, lambda: self._turns.room())
        self._turns = Turns(
            concurrency=_affordable(config.concurrency),
            host_failures=config.host_failures,
            host_cooldown_s=config.host_cooldown_s,
            host_patience_s=config.host_patience_s,
            has_room=lambda: self._budget.has_room,
            has_plenty=lambda: self._budget.has_plenty,
            may_ask=lambda host, now: self._shares.may_ask(host, now),
            gave_back=lambda host: self._shares.exchange_soon(host) if host.limited and not self._stopped else None,
        )
        self._shares = Shares(
            self._ask,
            uuid.uuid4().hex,
            most_connections=config.connections_per_host,
            deadline_s=config.deadline_s,
            state=self.state,
            granted=self._granted,
            rests=self._turns.leave_alone,
            broken=self._stop,
        )
        self._outage = Outage(
            patience_s=config.outage_patience_s,
            probe=self._probe,
            active=lambda: self._active,
            paused=self._turns.pause,
            resumed=self._resumed,
            broken=self._stop,
        )
        self._exchanges = Exchanges(config, self._turns, self._budget, self._tls)
        self._tick()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ticking.cancel()
        self._outage.close()
        self._robots.close()
        self._stopped = self._stopped or RuntimeError("the fetcher is closed")
        self._turns.close()
        for host in self._hosts:
            if host.timer is not None:
                host.timer.cancel()
        self._shares.close()
        self._resolver.close()
        self._unfolding.shutdown(wait=False, cancel_futures=True)
        # Connections end in the loop's next round.
        await asyncio.sleep(0)

    def fetched(self, url: str) -> Fetching:
        """Never raises for what a URL, a server or a network does; `WorkFailed` when an outage outlasts patience."""
        return Fetching(self, url)

    def state(self) -> dict[str, Any]:
        """Plain data: what is going on."""
        since = self._outage.since
        return {
            "in_flight": self._turns.in_flight,
            "waiting": self._turns.waiting,
            "cooling": [host.label for host in list(self._turns.cooling)[:20]],
            "outage": False if since is None else _outage_in_words(since),
            "buffered_bytes": self._budget.used,
        }

    # One URL.

    async def _fetch(self, url: str) -> tuple[Fetched, Answer | None]:
        errand = Errand(self._config.deadline_s, self._config.host_patience_s)
        label = ""
        try:
            target = self._policy.check_url(url)
            label = self._hosts.of(target, monotonic()).label
            answer = await self._persist(errand, target, self._caps, robots=self._config.respect_robots_txt)
            return Fetched(answer.body, attempts=errand.attempts, host=label), answer
        except FetchFailed as failure:
            return Fetched(None, Status.FETCH_FAILED, failure.reason, errand.attempts, label), None
        except HostGone as gone:
            return Fetched(None, Status.FETCH_FAILED, gone.reason, errand.attempts - 1, label), None
        except Refused as refusal:
            return Fetched(None, Status.REFUSED, refusal.reason, max(1, errand.attempts), label), None

    async def _robots_txt(self, url: URL) -> bytes:
        errand = Errand(self._config.deadline_s, self._config.host_patience_s)
        try:
            answer = await self._persist(errand, url, self._robots_caps, robots=False)
        except HostGone as gone:
            raise FetchFailed(gone.reason, may_pass=False) from None
        body = answer.body
        answer.drop()
        return body

    async def _persist(self, errand: Errand, target: URL, caps: Caps, *, robots: bool) -> Answer:
        while True:
            errand.attempts += 1
            left_s = errand.left_s
            self._active += 1
            try:
                return await self._follow(errand, target, caps, robots)
            except NotCharged:
                errand.attempts -= 1
                errand.left_s = left_s
                continue
            except FetchFailed as failure:
                errand.attempts = failure.attempts = max(errand.attempts, failure.attempts)
                if not failure.may_pass or errand.attempts >= self._config.attempts:
                    raise
                # Jitter spreads the retries of a host that failed many rows at once.
                pause_s = self._config.backoff_s * 2 ** (errand.attempts - 1) * (0.5 + random.random())  # noqa: S311
                if pause_s >= errand.left_s:
                    raise
            finally:
                self._active -= 1
            errand.left_s -= pause_s
            await asyncio.sleep(pause_s)

    async def _follow(self, errand: Errand, target: URL, caps: Caps, robots: bool) -> Answer:
        for _ in range(MAX_REDIRECTS + 1):
            answer = await self._get(errand, target, caps, robots)
            if answer.location is None:
                return answer
            answer.drop()
            target = self._policy.check_url(_joined(target, answer.location))
        raise FetchFailed("too_many_redirects", may_pass=False)

    async def _get(self, errand: Errand, url: URL, caps: Caps, robots: bool) -> Answer:
        host = self._hosts.of(url, monotonic())
        try:
            if host.resolved is None or host.resolved.until < monotonic():
                await self._resolve(errand, host)
            if robots:
                await self._robots_allow(host, url)
            answer = await self._exchanges.get(errand, host, url, caps)
            if answer.status:
                self._outage.answered(host)
            if answer.folded:
                await self._unfold(answer)
            if answer.failure is not None:
                answer.drop()
                raise answer.failure
        except FetchFailed as failure:
            if failure.network and not await self._outage.is_theirs(host):
                raise NotCharged from None
            raise
        return answer

    async def _unfold(self, answer: Answer) -> None:
        try:
            answer.unfolded(await self._loop.run_in_executor(self._unfolding, answer.unfold))
        except TooLarge:
            answer.failure = Refused("body_too_large_decompressed")
        except UnknownEncoding:
            answer.failure = FetchFailed("content_encoding", may_pass=False)
        except FetchFailed as failure:
            answer.failure = failure
        except asyncio.CancelledError:
            answer.drop()
            raise

    async def _robots_allow(self, host: Host, url: URL) -> None:
        """Raises `Refused` and `FetchFailed` as the rules say. Asking for them is an errand of its own."""
        self._active -= 1
        try:
            await self._robots.check(host.key, url)
        finally:
            self._active += 1

    async def _resolve(self, errand: Errand, host: Host) -> None:
        asked_at = monotonic()
        try:
            host.resolved = resolved = await self._resolver.resolve(host.name, host.port)
        except Unresolvable as error:
            errand.left_s -= min(error.seconds, monotonic() - asked_at)
            raise FetchFailed("dns", may_pass=error.may_pass, network=error.may_pass) from None
        errand.left_s -= min(resolved.seconds, monotonic() - asked_at)
        inside = all(self._policy.allows(address, host.port) for address in resolved.addresses)
        host.limited = not inside or self._config.limit_allowed_networks

    # The worker as a whole.

    def _granted(self, host: Host) -> None:
        while host.limited and host.idle and host.open > host.grant.connections:
            self._turns.close_one_idle(host)
        self._turns.wake(host)

    async def _probe(self, host: Host) -> bool:
        """Whether the host can be connected to right now, with its name resolved anew."""
        if host.resting_until > monotonic() and host.down_since is None:
            return False
        try:
            async with asyncio.timeout(_PROBE_S):
                if self._resolver.forget(host.name):
                    host.resolved = None
                resolved = await self._resolver.resolve(host.name, host.port)
                transport, _ = await self._loop.create_connection(
                    asyncio.Protocol, str(resolved.addresses[host.address % len(resolved.addresses)]), host.port
                )
                transport.abort()
                return True
        except (TimeoutError, OSError, Refused, Unresolvable):
            return False

    def _resumed(self, failed: list[Host]) -> None:
        self._resolver.forget_failures()
        for host in failed:
            self._turns.forgive(host)
        self._turns.resume()

    def _stop(self, error: Exception) -> None:
        """Nothing can be fetched any more: every row that waits is told so."""
        self._stopped = error
        self._turns.fail_all(self._hosts, error)
        self._outage.close(error)

    def _tick(self) -> None:
        self._turns.sweep()
        self._shares.tick()
        self._ticking = self._loop.call_later(1.0, self._tick)


def _joined(url: URL, location: str) -> str:
    location = location.strip()
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in location):
        raise FetchFailed("bad_redirect", may_pass=False)
    try:
        return str(url.join(URL(location)))
    except ValueError:
        raise FetchFailed("bad_redirect", may_pass=False) from None


def _outage_in_words(since: float) -> str:
    """The same words as long as the outage lasts: they are said once."""
    return f"no host answers since {datetime.now(UTC) - timedelta(seconds=monotonic() - since):%H:%M} UTC"


def _affordable(concurrency: int) -> int:
    """As many requests as there may be open files; the soft limit is raised as far as the hard one allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = concurrency + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < wanted:
            log.warning("only %d files may be open: %d requests in flight instead of %d", soft, soft // 2, concurrency)
            return max(1, soft // 2)
    return concurrency
