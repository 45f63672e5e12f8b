"""The guarded fetch: one URL in, its bytes or the reason why not.

Every redirect hop is a new request under the full guard. A deadline covers all attempts and hops of a URL together;
a body that drips slower than `min_bytes_per_s` after its first seconds is given up, so that no server can hold a slot.
What may pass (429, 5xx, resets, timeouts, cut bodies) is tried again with backoff; what will not is not.

The proxy settings of the environment are ignored, there are no cookies, and nothing is sent but an honest User-Agent.
"""

import asyncio
import random
import ssl
import zlib
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import aiohttp
from yarl import URL

from ingest.address import AddressPolicy, GuardedResolver, Refused, Unresolvable
from ingest.config import ImagesConfig
from ingest.ledger import Status
from ingest.pacing import ConnectionPacer

MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAY_PASS = frozenset({408, 425, 429, 500, 502, 503, 504})
_ROBOTS_REFUSALS = ("noai", "noimageai", "noindex", "noimageindex", "none")


@dataclass(frozen=True)
class Fetched:
    """`body` where the fetch succeeded; else `status` (fetch_failed or refused) and `reason`."""

    body: bytes | None
    status: Status = Status.OK
    reason: str | None = None
    attempts: int = 1


class FetchFailed(Exception):
    """The web said no, or nothing. `may_pass`: another attempt may fare better."""

    def __init__(self, reason: str, *, may_pass: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.may_pass = may_pass


class Fetcher:
    """Fetches any number of URLs at a time on the running event loop; an async context manager."""

    def __init__(self, config: ImagesConfig) -> None:
        self._config = config
        self._policy = AddressPolicy(config.allow_networks)
        self._hosts: defaultdict[tuple[str, int], asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(config.connections_per_host)
        )

    async def __aenter__(self) -> Self:
        self._resolver = GuardedResolver(self._policy)
        self._pacer = ConnectionPacer()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=self._resolver, use_dns_cache=False, limit=self._config.concurrency, ssl=True
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),
            headers={"User-Agent": self._config.user_agent, "Accept": "image/*,*/*;q=0.1"},
            skip_auto_headers=("Accept-Encoding",),
            auto_decompress=False,
            trust_env=False,
            trace_configs=[self._pacer.tracing],
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()
        await self._resolver.close()

    async def fetch(self, url: str) -> Fetched:
        """Never raises for what a URL, a server or a network does."""
        attempt = 0
        try:
            async with asyncio.timeout(self._config.deadline_s) as deadline:
                while True:
                    attempt += 1
                    try:
                        return Fetched(await self._follow(url, deadline), attempts=attempt)
                    except FetchFailed as failure:
                        if not failure.may_pass or attempt >= self._config.attempts:
                            return Fetched(None, Status.FETCH_FAILED, failure.reason, attempt)
                    # Jitter spreads the retries of a host that failed many rows at once.
                    await asyncio.sleep(self._config.backoff_s * 2 ** (attempt - 1) * (0.5 + random.random()))  # noqa: S311
        except TimeoutError:
            return Fetched(None, Status.FETCH_FAILED, "deadline", attempt)
        except Refused as refusal:
            return Fetched(None, Status.REFUSED, refusal.reason, attempt)

    async def _follow(self, url: str, deadline: asyncio.Timeout) -> bytes:
        target = self._policy.check_url(url)
        for _ in range(MAX_REDIRECTS + 1):
            answer = await self._get(target, deadline)
            if isinstance(answer, bytes):
                return answer
            target = self._policy.check_url(answer)
        raise FetchFailed("too_many_redirects", may_pass=False)

    async def _get(self, url: URL, deadline: asyncio.Timeout) -> bytes | str:
        """The body, or the URL that a redirect names."""
        assert url.raw_host is not None and url.port is not None, "check_url lets no other URL through"
        opening = self._pacer.opening(url.raw_host, url.port)
        try:
            inside = await self._resolver.check(url.raw_host, url.port)
            slots = None if inside else self._hosts[url.raw_host, url.port]
            async with (
                _slot(slots, deadline),
                self._session.get(url, allow_redirects=False, trace_request_ctx=opening) as response,
            ):
                opening.answered()
                if response.status in _REDIRECTS:
                    return _location(url, response)
                if response.status != 200:
                    raise FetchFailed(f"http_{response.status}", may_pass=response.status in _MAY_PASS)
                if self._config.respect_robots_tag and _robots_refuse(response):
                    raise Refused("x_robots_tag")
                return await self._body(response)
        except Unresolvable:
            raise FetchFailed("dns", may_pass=False) from None
        except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError, ConnectionResetError):
            raise FetchFailed("connection_cut", may_pass=True) from None
        except (aiohttp.ClientSSLError, ssl.SSLError):
            raise FetchFailed("tls", may_pass=False) from None
        except (aiohttp.ClientConnectionError, OSError):
            raise FetchFailed("connection_failed", may_pass=True) from None
        except (aiohttp.ClientError, ValueError):
            raise FetchFailed("bad_response", may_pass=False) from None
        finally:
            opening.answered()

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        config = self._config
        if (response.content_length or 0) > config.max_bytes:
            raise Refused("body_too_large")
        inflate = _inflater(response.headers.get("Content-Encoding", "").strip().lower())
        clock = asyncio.get_running_loop()
        started = clock.time()
        chunks: list[bytes] = []
        received = stored = 0
        while True:
            patience_s = config.min_rate_after_s
            if config.min_bytes_per_s > 0:
                patience_s = max(patience_s, received / config.min_bytes_per_s)
            try:
                async with asyncio.timeout_at(started + patience_s if config.min_bytes_per_s > 0 else None):
                    chunk = await response.content.readany()
            except TimeoutError:
                # A stall of ours is not the server's: what had come by now is in the buffer.
                chunk = response.content.read_nowait()
                if not chunk and not response.content.at_eof():
                    raise FetchFailed("too_slow", may_pass=False) from None
            if not chunk:
                break
            received += len(chunk)
            if received > config.max_bytes:
                raise Refused("body_too_large")
            if inflate is not None:
                chunk = _inflated(inflate, chunk, config.max_decompressed_bytes - stored)
            stored += len(chunk)
            chunks.append(chunk)
        if inflate is not None and not inflate.eof:
            raise FetchFailed("connection_cut", may_pass=True)
        if not stored:
            raise FetchFailed("empty_body", may_pass=False)
        return b"".join(chunks)


@asynccontextmanager
async def _slot(slots: asyncio.Semaphore | None, deadline: asyncio.Timeout) -> AsyncIterator[None]:
    """Hold one of a host's slots. The wait for it is our own doing and does not count against the URL's deadline."""
    # A deadline that has just passed cannot be moved any more; the request is cancelled at its next step.
    if slots is None or deadline.expired():
        yield
        return
    clock = asyncio.get_running_loop()
    left_s = (deadline.when() or clock.time()) - clock.time()
    deadline.reschedule(None)
    async with slots:
        deadline.reschedule(clock.time() + left_s)
        yield


def _location(url: URL, response: aiohttp.ClientResponse) -> str:
    location = response.headers.get("Location")
    if not location:
        raise FetchFailed("bad_redirect", may_pass=False)
    try:
        return str(url.join(URL(location)))
    except ValueError:
        raise FetchFailed("bad_redirect", may_pass=False) from None


def _robots_refuse(response: aiohttp.ClientResponse) -> bool:
    """Whether X-Robots-Tag forbids the use for everyone: a directive behind a crawler's name is not for us."""
    for header in response.headers.getall("X-Robots-Tag", ()):
        crawler, named, rest = header.partition(":")
        if named and crawler.strip().lower() not in ("unavailable_after", "*", "unclip"):
            continue
        directives = rest if named else header
        if any(word.strip().lower() in _ROBOTS_REFUSALS for word in directives.split(",")):
            return True
    return False


def _inflater(encoding: str) -> "zlib._Decompress | None":
    if encoding in ("", "identity"):
        return None
    if encoding in ("gzip", "x-gzip", "deflate"):
        return zlib.decompressobj(zlib.MAX_WBITS | 32)
    raise FetchFailed("content_encoding", may_pass=False)


def _inflated(inflate: "zlib._Decompress", chunk: bytes, room: int) -> bytes:
    """At most `room` bytes; one more refuses the body, so that a bomb is never unfolded."""
    try:
        data = inflate.decompress(chunk, room + 1)
    except zlib.error:
        raise FetchFailed("content_encoding", may_pass=False) from None
    if len(data) > room:
        raise Refused("body_too_large_decompressed")
    return data
