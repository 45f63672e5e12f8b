import asyncio
import gzip
import time

import pytest
import uvloop

from ingest.config import ImagesConfig
from ingest.exchange import patience
from ingest.fetch import Fetched, Fetcher
from ingest.outcome import Status
from tests.ingest.conftest import HostileServer, free_port

QUICK = {
    "deadline_s": 2.0, "min_rate_after_s": 0.4, "backoff_s": 0.01, "max_bytes": 100_000,
    "max_decompressed_bytes": 200_000, "allow_networks": ["127.0.0.1/32"],
}  # fmt: skip


async def one(fetcher: Fetcher, url: str) -> Fetched:
    async with fetcher.fetched(url) as fetched:
        return fetched


def fetch(*urls: str, **settings: object) -> list[Fetched]:
    async def all_of_them() -> list[Fetched]:
        async with Fetcher(ImagesConfig(**{**QUICK, **settings})) as fetcher:  # type: ignore[arg-type]
            return await asyncio.gather(*(one(fetcher, url) for url in urls))

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("path", ["/good", "/gzip", "/to_good", "/hop5", "/flaky", "/named_noindex"])
def test_good_answers_give_the_body(hostile: HostileServer, path: str):
    hostile.requests.clear()
    assert fetch(hostile.url + path)[0].body == hostile.picture


@pytest.mark.parametrize(
    ("path", "status", "reason", "attempts"),
    [
        ("/400", "fetch_failed", "http_400", 1),
        ("/404", "fetch_failed", "http_404", 1),
        ("/410", "fetch_failed", "http_410", 1),
        ("/429", "fetch_failed", "http_429", 3),
        ("/500", "fetch_failed", "http_500", 3),
        ("/503", "fetch_failed", "http_503", 3),
        ("/truncated", "fetch_failed", "connection_cut", 3),
        ("/cut_chunks", "fetch_failed", "connection_cut", 3),
        ("/cut_gzip", "fetch_failed", "connection_cut", 3),
        ("/reset", "fetch_failed", "connection_cut", 3),
        ("/empty", "fetch_failed", "empty_body", 1),
        ("/brotli", "fetch_failed", "content_encoding", 1),
        ("/garbage", "fetch_failed", "bad_response", 1),
        ("/drip", "fetch_failed", "too_slow", 1),
        ("/silent", "fetch_failed", "deadline", 1),
        ("/loop", "fetch_failed", "too_many_redirects", 1),
        ("/hop6", "fetch_failed", "too_many_redirects", 1),
        ("/no_location", "fetch_failed", "bad_redirect", 1),
        ("/declared_large", "refused", "body_too_large", 1),
        ("/endless", "refused", "body_too_large", 1),
        ("/bomb", "refused", "body_too_large_decompressed", 1),
        ("/noai", "refused", "x_robots_tag", 1),
        ("/to_private", "refused", "address_private", 1),
        ("/to_metadata", "refused", "address_link_local", 1),
        ("/to_file", "refused", "scheme", 1),
        ("/to_odd_spelling", "refused", "address_spelling", 1),
        ("/to_credentials", "refused", "url_credentials", 1),
    ],
)
def test_each_misbehaviour_has_its_reason(hostile: HostileServer, path: str, status: str, reason: str, attempts: int):
    hostile.requests.clear()
    started = time.monotonic()
    fetched = fetch(hostile.url + path)[0]
    assert (fetched.status, fetched.reason, fetched.body) == (Status(status), reason, None)
    assert fetched.attempts == attempts
    assert time.monotonic() - started < QUICK["deadline_s"] + 1  # type: ignore[operator]


def test_without_allowed_networks_nothing_on_loopback_is_contacted(hostile: HostileServer):
    hostile.requests.clear()
    port = hostile.port
    hosts = ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "127.1", "0", "0.0.0.0"]
    results = fetch(*(f"http://{host}:{port}/good" for host in hosts), allow_networks=[])
    assert [result.status for result in results] == [Status.REFUSED] * len(hosts)
    assert not hostile.requests


def test_a_network_allowed_with_a_port_opens_that_port_only(hostile: HostileServer):
    url = f"{hostile.url}/good"
    assert fetch(url, allow_networks=[f"127.0.0.1/32:{hostile.port}"])[0].body == hostile.picture
    assert fetch(url, allow_networks=["127.0.0.1/32:1"])[0].reason == "address_loopback"


def test_names_are_resolved_and_reached_at_the_checked_address(hostile: HostileServer):
    url = f"http://localhost:{hostile.port}/good"
    assert fetch(url, allow_networks=["127.0.0.0/8", "::1/128"])[0].body == hostile.picture
    assert f"Host: localhost:{hostile.port}" in hostile.heads[-1]


def test_a_closed_port_and_an_unknown_name_fail(hostile: HostileServer):
    closed, unknown = fetch(f"http://127.0.0.1:{free_port()}/x", "http://no-such-host.invalid/x")
    assert (closed.reason, closed.attempts) == ("connection_failed", 3)
    assert unknown.reason == "dns"


def test_the_environments_proxy_is_ignored(hostile: HostileServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    assert fetch(f"{hostile.url}/good")[0].body == hostile.picture


def test_requests_say_who_they_are_and_nothing_else(hostile: HostileServer):
    fetch(f"{hostile.url}/good", user_agent="unclip-test")
    names = {line.partition(":")[0].lower() for line in hostile.heads[-1].splitlines()[1:] if line}
    assert "User-Agent: unclip-test" in hostile.heads[-1]
    assert names == {"host", "user-agent", "accept", "accept-encoding"}


def test_robots_tag_can_be_switched_off(hostile: HostileServer):
    assert fetch(f"{hostile.url}/noai", respect_robots_tag=False)[0].body == hostile.picture


def test_hundreds_are_in_flight_and_one_slow_url_holds_nobody(hostile: HostileServer):
    urls = [f"{hostile.url}/drip", *[f"{hostile.url}/good"] * 200]
    started = time.monotonic()
    results = fetch(*urls)
    assert [result.body for result in results[1:]] == [hostile.picture] * 200
    assert time.monotonic() - started < 5


def test_a_bomb_holds_up_nobody_else(hostile: HostileServer):
    """300 MB are unfolded in tenths of a second; the loop goes round and round meanwhile."""
    hostile.answers["/great_bomb"] = [hostile.ok(gzip.compress(bytes(400_000_000), 1), "Content-Encoding: gzip\r\n")]
    settings = {**QUICK, "max_bytes": 10_000_000, "max_decompressed_bytes": 300_000_000, "deadline_s": 30.0}

    async def rounds() -> int:
        async with Fetcher(ImagesConfig(**settings)) as fetcher:  # type: ignore[arg-type]
            fetching = asyncio.create_task(one(fetcher, f"{hostile.url}/great_bomb"))
            while not (fetcher.state()["buffered_bytes"] or fetching.done()):
                await asyncio.sleep(0.001)
            count = 0
            while not fetching.done():
                await asyncio.sleep(0.001)
                count += 1
            assert fetching.result().reason == "body_too_large_decompressed"
            return count

    assert asyncio.run(rounds()) > 20


def test_a_connection_that_is_made_while_the_loop_stands_still_counts():
    async def connect() -> None:
        server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
        loop, port = asyncio.get_running_loop(), server.sockets[0].getsockname()[1]
        async with patience(0.05):
            connecting = asyncio.create_task(loop.create_connection(asyncio.Protocol, "127.0.0.1", port))
            await asyncio.sleep(0)
            time.sleep(0.2)
            transport, _ = await connecting
        transport.close()
        server.close()
        with pytest.raises(TimeoutError):
            async with patience(0.05):
                await asyncio.sleep(1)

    asyncio.run(connect())
    uvloop.run(connect())
