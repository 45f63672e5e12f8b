import asyncio
import time
from collections import Counter

import pytest
import uvloop

from ingest.fetch import Fetcher
from ingest.outcome import Status
from tests.ingest.web import BODY, Host, config, fetch, fetch_all, fetch_one, ok, web


def silent(path: str) -> None:
    return None


def test_one_slow_host_with_a_thousand_rows_delays_no_other():
    with web() as loopback:
        slow = loopback.open("127.0.5.1", Host(lambda path: [0.2, ok()]))
        quick = [loopback.open(f"127.0.5.{number}") for number in range(2, 12)]

        async def run() -> tuple[float, float]:
            async with Fetcher(config(concurrency=100)) as fetcher:
                started = time.monotonic()
                behind = [asyncio.create_task(fetch_one(fetcher, f"{slow.url}/{row}")) for row in range(1000)]
                await asyncio.sleep(0.05)
                rows = [f"{host.url}/{row}" for host in quick for row in range(30)]
                assert all(one.body == BODY for one in await fetch_all(fetcher, *rows))
                quick_s = time.monotonic() - started
                assert all(one.body == BODY for one in await asyncio.gather(*behind))
                return quick_s, time.monotonic() - started

        quick_s, all_s = uvloop.run(run())
    assert quick_s < 1.0
    assert all_s > 2  # 1000 rows of 0.2 s over at most 100 slots: the others overtook them


def test_where_there_is_plenty_to_do_hosts_that_answer_at_once_are_not_asked_ahead_and_slow_ones_are():
    large = b"x" * 40_000
    with web() as loopback:
        quick = loopback.open("127.0.5.1", Host(lambda path: [ok(large)]))
        slow = loopback.open("127.0.5.2", Host(lambda path: [0.1, ok(large)]))
        hosts = (quick, slow)
        used = asyncio.Event()

        async def use(fetcher: Fetcher, url: str) -> bool:
            async with fetcher.fetched(url) as fetched:
                await used.wait()
                return fetched.body == large

        async def run() -> list[int]:
            async with Fetcher(config(buffered_bytes=40_000_000)) as fetcher:  # 400 of these bodies are plenty
                for host in hosts:
                    await fetch_all(fetcher, *(f"{host.url}/{row}" for row in range(40)))
                rows = [f"{quick.url}/{row}" for row in range(800)] + [f"{slow.url}/{row}" for row in range(100)]
                tasks = [asyncio.create_task(use(fetcher, url)) for url in rows]
                await asyncio.sleep(1.0)
                asked = [len(host.requests) - 41 for host in hosts]
                used.set()
                assert all(await asyncio.gather(*tasks))
                return asked

        of_quick, of_slow = uvloop.run(run())
    assert of_slow == 100
    assert 200 <= of_quick < 700


def test_no_more_requests_are_in_flight_than_configured():
    with web() as loopback:
        hosts = [loopback.open(f"127.0.5.{number}", Host(lambda path: [0.05, ok()])) for number in range(1, 31)]
        rows = [f"{host.url}/{row}" for host in hosts for row in range(5)]
        most = 0

        async def run() -> None:
            nonlocal most
            async with Fetcher(config(concurrency=10, respect_robots_txt=False)) as fetcher:
                fetching = asyncio.create_task(fetch_all(fetcher, *rows))
                while not fetching.done():
                    most = max(most, fetcher.state()["in_flight"])
                    await asyncio.sleep(0.005)
                assert all(one.body == BODY for one in await fetching)

        uvloop.run(run())
    assert most == 10


def test_hosts_that_accept_and_never_answer_do_not_slow_the_living():
    def rows_a_second(dead: int) -> float:
        with web() as loopback:
            living = [loopback.open(f"127.0.5.{number}", Host(lambda path: [0.02, ok()])) for number in range(1, 71)]
            silent_ones = [
                loopback.open(f"127.0.6.{number}", Host(silent, lambda: None)) for number in range(1, dead + 1)
            ]

            async def run() -> float:
                async with Fetcher(config(deadline_s=3.0)) as fetcher:
                    fates = [asyncio.create_task(fetch_one(fetcher, f"{host.url}/x")) for host in silent_ones]
                    started = time.monotonic()
                    rows = [f"{host.url}/{row}" for host in living for row in range(20)]
                    assert all(one.body == BODY for one in await fetch_all(fetcher, *rows))
                    seconds = time.monotonic() - started
                    assert {one.reason for one in await asyncio.gather(*fates)} <= {"deadline"}
                    return len(rows) / seconds

            return uvloop.run(run())

    alone = max(rows_a_second(0), rows_a_second(0))
    assert rows_a_second(200) > 0.6 * alone  # a smoke test: the benchmark measures


def test_a_host_that_keeps_failing_is_left_alone_and_its_rows_end_without_a_deadline_each():
    with web() as loopback:
        good = loopback.open("127.0.5.1")
        down = loopback.open("127.0.5.2", Host(silent))
        settings = {
            "host_failures": 4,
            "host_cooldown_s": 0.3,
            "host_patience_s": 1.0,
            "deadline_s": 0.5,
            "attempts": 1,
        }
        rows = [f"{down.url}/{row}" for row in range(200)]
        started = time.monotonic()
        fetched = fetch(f"{good.url}/x", *rows, connections_per_host=8, limit_allowed_networks=True, **settings)
        seconds = time.monotonic() - started
        reasons = Counter(one.reason for one in fetched[1:])
    assert fetched[0].body == BODY
    assert {one.status for one in fetched[1:]} == {Status.FETCH_FAILED}
    assert set(reasons) == {"deadline", "host_down"}
    assert down.asked("/robots.txt") == 1
    assert 8 <= reasons["deadline"] <= 12  # those in flight, and the probes
    assert len(down.requests) <= 13
    assert seconds < 4


def test_a_host_that_comes_back_is_asked_again_and_loses_no_row():
    with web() as loopback:
        host = loopback.open("127.0.5.1")
        settings = {"host_failures": 3, "host_cooldown_s": 0.3, "host_patience_s": 10.0, "attempts": 3}

        async def run() -> list[object]:
            async with Fetcher(config(**settings)) as fetcher:
                assert (await fetch_one(fetcher, f"{host.url}/first")).body == BODY
                port = loopback.shut(host)
                rows = [asyncio.create_task(fetch_one(fetcher, f"{host.url}/{row}")) for row in range(50)]
                await asyncio.sleep(0.6)
                assert fetcher.state()["cooling"] == [f"127.0.5.1:{port}"]
                loopback.open("127.0.5.1", host, port=port)
                ended = [one.body for one in await asyncio.gather(*rows)]
                assert fetcher.state()["cooling"] == []
                return ended

        bodies = uvloop.run(run())
    # Rows that used up their attempts before the host was known to be down ended; those that waited did not.
    assert bodies.count(BODY) >= 40


@pytest.mark.parametrize("status", ["429 Slow", "503 Busy"])
@pytest.mark.parametrize("spelled", ["seconds", "date"])
def test_retry_after_is_honoured_to_the_row(status: str, spelled: str):
    refused_at: list[float] = []

    def answer(path: str) -> list[bytes | float]:
        if refused_at:
            return [ok()]
        refused_at.append(time.monotonic())
        at = "1" if spelled == "seconds" else time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
        return [ok(b"", f"Retry-After: {at}\r\n", status)]

    with web() as loopback:
        host = loopback.open("127.0.5.1", Host(answer))
        rows = [f"{host.url}/{row}" for row in range(40)]
        fetched = fetch(*rows, connections_per_host=1, limit_allowed_networks=True, requests_per_s_per_host=1000)
    assert all(one.body == BODY for one in fetched)
    later = [at for at, path in host.requests if at > refused_at[0] + 0.001]
    assert min(later) - refused_at[0] >= 0.98
    assert sorted(one.attempts for one in fetched) == [1] * 39 + [2]


def test_a_host_that_wants_more_patience_than_we_have_is_never_contacted_earlier():
    def answer(path: str) -> list[bytes | float]:
        return [ok(b"", "Retry-After: 3600\r\n", "429 Slow")]

    with web() as loopback:
        host = loopback.open("127.0.5.1", Host(answer))
        started = time.monotonic()
        rows = [f"{host.url}/{row}" for row in range(100)]
        fetched = fetch(*rows, connections_per_host=2, limit_allowed_networks=True, host_patience_s=5.0)
        seconds = time.monotonic() - started
    assert {(one.status, one.reason) for one in fetched} == {(Status.FETCH_FAILED, "http_429")}
    assert len(host.requests) - host.asked("/robots.txt") <= 2
    assert seconds < 1


def test_waiting_for_a_slot_of_ours_costs_no_deadline():
    """Twenty rows of one slow host, one connection at a time: each has its own deadline from when its turn comes."""
    with web() as loopback:
        host = loopback.open("127.0.5.1", Host(lambda path: [0.1, ok()]))
        rows = [f"{host.url}/{row}" for row in range(20)]
        fetched = fetch(*rows, deadline_s=0.8, connections_per_host=1, limit_allowed_networks=True)
    assert [one.body for one in fetched] == [BODY] * 20
    assert host.most_open == 1


def test_what_is_closed_before_its_turn_leaves_nothing_behind():
    with web() as loopback:
        host = loopback.open("127.0.5.1", Host(lambda path: [0.3, ok()]))

        async def run() -> dict[str, object]:
            async with Fetcher(config(concurrency=4)) as fetcher:
                rows = [asyncio.create_task(fetch_one(fetcher, f"{host.url}/{row}")) for row in range(50)]
                await asyncio.sleep(0.1)
                for row in rows:
                    row.cancel()
                await asyncio.gather(*rows, return_exceptions=True)
                assert (await fetch_one(fetcher, f"{host.url}/after")).body == BODY
                return fetcher.state()

        state = uvloop.run(run())
    assert (state["in_flight"], state["waiting"], state["buffered_bytes"]) == (0, 0, 0)
