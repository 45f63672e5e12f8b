"""What the work costs with nothing around it: decoding alone, fetching alone, in processes of their own.

Every function runs in a fresh process (benchmarks/ingest/spread.py), prepares itself, and waits for its fellows before
every lap.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.ingest.spread import Laps

WARM = 16


def decode_ours(barrier: Any, paths: list[Path], settings: dict[str, Any], repeats: int) -> Laps:
    from ingest.config import ImagesConfig
    from ingest.decode import decode
    from ingest.filters import Filters

    config = ImagesConfig(**settings)
    filters = Filters(config.filters, {})

    def one(body: bytes) -> None:
        assert decode(body, config, filters).data is not None

    bodies = [path.read_bytes() for path in paths]
    for body in bodies[:WARM]:
        one(body)
    laps = []
    for _ in range(repeats):
        barrier.wait()
        started, cpu = time.perf_counter(), time.process_time()
        for body in bodies:
            one(body)
        laps.append((time.perf_counter() - started, time.process_time() - cpu))
    return laps


def fetch_ours(barrier: Any, urls: list[str], settings: dict[str, Any], at_once: int, repeats: int) -> Laps:
    """Our Fetcher with every guard on; bodies are thrown away."""
    from ingest.config import ImagesConfig
    from ingest.fetch import Fetcher

    async def run() -> Laps:
        async with Fetcher(ImagesConfig(**settings)) as fetcher:

            async def one(url: str) -> None:
                async with fetcher.fetched(url) as fetched:
                    assert fetched.body is not None, fetched

            return [await _over_urls(barrier, urls, one, at_once) for _ in range(repeats)]

    return uvloop.run(run())


async def _over_urls(
    barrier: Any, urls: list[str], one: Callable[[str], Awaitable[None]], at_once: int
) -> tuple[float, float]:
    async def consume(some: Iterator[str]) -> None:
        for url in some:
            await one(url)

    await asyncio.to_thread(barrier.wait)
    started, cpu = time.perf_counter(), time.process_time()
    rest = iter(urls)
    await asyncio.gather(*(consume(rest) for _ in range(at_once)))
    return time.perf_counter() - started, time.process_time() - cpu


def fetch_bare(barrier: Any, urls: list[str], connections: int, repeats: int) -> Laps:
    """The least that HTTP takes: connections kept open, one request at a time on each, bytes counted and dropped."""

    async def run() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        host, _, port = urls[0].split("/")[2].partition(":")
        waiting, done = iter(urls), loop.create_future()
        await asyncio.to_thread(barrier.wait)
        started, cpu = time.perf_counter(), time.process_time()
        left = [len(urls)]
        for _ in range(connections):
            await loop.create_connection(lambda: _Bare(waiting, left, done), host, int(port))
        await done
        return time.perf_counter() - started, time.process_time() - cpu

    return [uvloop.run(run()) for _ in range(repeats)]


class _Bare(asyncio.Protocol):
    def __init__(self, urls: Iterator[str], left: list[int], done: "asyncio.Future[None]") -> None:
        self._urls, self._left, self._done = urls, left, done
        self._missing = 0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._ask()

    def data_received(self, data: bytes) -> None:
        if not self._missing:
            end = data.index(b"\r\n\r\n") + 4
            length = data.index(b"Content-Length: ") + 16
            self._missing = int(data[length : data.index(b"\r", length)]) + end
        self._missing -= len(data)
        if not self._missing:
            self._left[0] -= 1
            if self._left[0]:
                self._ask()
            else:
                self._done.set_result(None)

    def _ask(self) -> None:
        if (url := next(self._urls, None)) is not None:
            path = url.split("/", 3)[3]
            self._transport.write(b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % path.encode())
