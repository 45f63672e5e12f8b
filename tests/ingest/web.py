"""Hosts on loopback (127.0.0.0/8 has as many as one likes) that answer as told and remember who came when."""

import asyncio
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import uvloop

from ingest.fetch import Fetched, Fetcher
from ingest.fetch_config import FetchConfig

T = TypeVar("T")

BODY = b"picture"


def ok(body: bytes = BODY, headers: str = "", status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


Script = list[bytes | float]
"""Bytes to send and seconds to wait. An empty script closes the connection, as does one that ends with b""."""


@dataclass
class Host:
    """`answer(path)` is a script; None keeps silent for ever. `robots` answers /robots.txt."""

    answer: Callable[[str], Script | None] = lambda path: [ok()]
    robots: Callable[[], Script | None] = lambda: [ok(b"", status="404 Not Found")]
    url: str = ""
    open: int = 0
    most_open: int = 0
    accepted: int = 0
    requests: list[tuple[float, str]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    transports: set[Any] = field(default_factory=set)

    @property
    def paths(self) -> list[str]:
        return [path for _, path in self.requests]

    def asked(self, path: str) -> int:
        return self.paths.count(path)


class _Connection(asyncio.Protocol):
    def __init__(self, host: Host) -> None:
        self._host = host
        self._received = b""
        self._playing: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._host.transports.add(transport)
        self._host.open += 1
        self._host.accepted += 1
        self._host.most_open = max(self._host.most_open, self._host.open)

    def connection_lost(self, error: Exception | None) -> None:
        self._host.transports.discard(self._transport)
        self._host.open -= 1
        if self._playing is not None:
            self._playing.cancel()

    def data_received(self, data: bytes) -> None:
        self._received += data
        while b"\r\n\r\n" in self._received:
            head, _, self._received = self._received.partition(b"\r\n\r\n")
            path = head.split(b" ")[1].decode()
            self._host.requests.append((time.monotonic(), path))
            self._host.heads.append(head.decode())
            script = self._host.robots() if path == "/robots.txt" else self._host.answer(path)
            if script is not None:
                self._playing = asyncio.get_running_loop().create_task(self._play(script))

    async def _play(self, script: Script) -> None:
        for step in script:
            if isinstance(step, float):
                await asyncio.sleep(step)
            else:
                self._transport.write(step)  # type: ignore[attr-defined]
        if not script or script[-1] == b"":
            self._transport.close()


class Web:
    """Opens and closes hosts while a test runs. Its loop has a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._servers: dict[int, asyncio.AbstractServer] = {}
        self._hosts: list[Host] = []

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def open(self, address: str, host: Host | None = None, *, port: int = 0, tls: ssl.SSLContext | None = None) -> Host:
        host = host or Host()
        self._hosts.append(host)

        async def listen() -> asyncio.AbstractServer:
            return await self._loop.create_server(lambda: _Connection(host), address, port, ssl=tls)

        server = self._servers[id(host)] = self.run(listen())
        host.url = f"{'http' if tls is None else 'https'}://{address}:{server.sockets[0].getsockname()[1]}"
        return host

    def shut(self, host: Host) -> int:
        """Nobody listens any more; open connections end. Returns the port, to open it again."""
        server = self._servers.pop(id(host))
        port = int(host.url.rpartition(":")[2])

        async def end() -> None:
            server.close()
            for transport in list(host.transports):
                transport.abort()

        self.run(end())
        return port

    def close(self) -> None:
        async def end() -> None:
            for server in self._servers.values():
                server.close()
            await asyncio.sleep(0.02)  # what was accepted by now becomes a connection
            for host in self._hosts:
                for transport in list(host.transports):
                    transport.abort()
            await asyncio.sleep(0.02)
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextmanager
def web() -> Iterator[Web]:
    opened = Web()
    try:
        yield opened
    finally:
        opened.close()


def config(**settings: Any) -> FetchConfig:
    quick = {"allow_networks": ("127.0.0.0/8",), "deadline_s": 2.0, "backoff_s": 0.02, "min_rate_after_s": 0.5}
    return FetchConfig(**{**quick, **settings})


async def fetch_one(fetcher: Fetcher, url: str) -> Fetched:
    async with fetcher.fetched(url) as fetched:
        return fetched


async def fetch_all(fetcher: Fetcher, *urls: str) -> list[Fetched]:
    return await asyncio.gather(*(fetch_one(fetcher, url) for url in urls))


def fetch(*urls: str, look_up: Any = None, trust: ssl.SSLContext | None = None, **settings: Any) -> list[Fetched]:
    """By one fetcher, all at once, on the loop that workers use."""

    async def all_of_them() -> list[Fetched]:
        more = {} if look_up is None else {"look_up": look_up}
        async with Fetcher(config(**settings), trust=trust, **more) as fetcher:
            return await fetch_all(fetcher, *urls)

    return uvloop.run(all_of_them())
