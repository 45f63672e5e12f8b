import asyncio
import time

from ingest.config import ImagesConfig
from ingest.fetch import Fetcher
from tests.ingest.conftest import jpeg

LATENCY_S = 0.1
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"


def test_connections_are_opened_a_few_at_a_time_and_then_reused():
    body = jpeg()
    accepted: list[float] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(time.monotonic())
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                await asyncio.sleep(LATENCY_S)
                writer.write(ANSWER % len(body) + body)
        except asyncio.IncompleteReadError:
            writer.close()

    async def run() -> tuple[float, float]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        async with server, Fetcher(ImagesConfig(allow_networks=("127.0.0.1/32",), concurrency=100)) as fetcher:
            started = time.monotonic()
            fetched = await asyncio.gather(*(fetcher.fetch(url) for _ in range(300)))
            seconds = time.monotonic() - started
            assert all(one.body == body for one in fetched)
        return started, seconds

    started, seconds = asyncio.run(run())
    assert len(accepted) <= 100
    # Four without an answer, and beyond those one every 5 ms: no burst that a short accept queue would drop.
    for place, at in enumerate(accepted):
        assert place <= 4 * (1 + (at - started) / LATENCY_S) + (at - started) / 0.005 + 2
    assert seconds < 300 * LATENCY_S / 4


def test_waiting_for_a_slot_of_ours_costs_no_deadline():
    """Twenty rows of one slow host, one connection at a time: each has its own deadline from when its turn comes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                await asyncio.sleep(LATENCY_S)
                writer.write(ANSWER % 1 + b"x")
        except asyncio.IncompleteReadError:
            writer.close()

    async def run() -> list[bytes | None]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        config = ImagesConfig(allow_networks=(f"127.0.0.1/32:{port}",), deadline_s=0.8, connections_per_host=1)
        async with server, Fetcher(config) as fetcher:
            # As for a public host, whose slots are counted.
            fetcher._policy.allows = lambda address, port: False  # type: ignore[method-assign]
            fetcher._policy.check_address = lambda address, port: None  # type: ignore[method-assign]
            return [
                one.body
                for one in await asyncio.gather(*(fetcher.fetch(f"http://127.0.0.1:{port}/") for _ in range(20)))
            ]

    assert asyncio.run(run()) == [b"x"] * 20
