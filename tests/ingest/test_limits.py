import asyncio
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.fetch import Fetcher
from ingest.limits import HostLimits, limits_settings, local_ask
from tests.ingest.web import BODY, Host, config, fetch_all, ok, web

STEP = st.tuples(
    st.sampled_from("abcd"),  # worker
    st.integers(0, 6),  # what it wants
    st.floats(0.0, 3.0),  # seconds since the last step
    st.sampled_from(["answered", "lost", "dies"]),
)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5), st.lists(STEP, max_size=40))
def test_shares_never_add_up_to_more_than_the_limit(limit: int, steps: list[tuple[str, int, float, str]]):
    """Each worker opens as much as it may at any time, misses replies that were lost, and stops with its lease."""
    now = 0.0
    limits = HostLimits(connections_per_host=limit, requests_per_s_per_host=10.0, lease_s=5.0, clock=lambda: now)
    caps: dict[str, tuple[int, float]] = {}
    sent: list[float] = []
    for worker, wanted, passed_s, fate in steps:
        now += passed_s
        caps = {name: (cap, until) for name, (cap, until) in caps.items() if until > now}
        cap, _ = caps.get(worker, (0, 0.0))
        opened = min(cap, wanted)
        reply = limits.exchange(worker, {"h": (cap, opened, wanted, wanted, 0.0, "")}, {})["h"]
        if fate == "answered":
            caps[worker] = (max(reply[0], opened), now + 5.0)
            sent += [now + reply[2] + place * reply[3] for place in range(reply[1])]
        elif fate == "dies":
            caps[worker] = (cap, caps[worker][1]) if worker in caps else (0, 0.0)
        assert sum(cap for cap, until in caps.values() if until > now) <= limit
    sent.sort()
    for early, late in zip(sent, sent[10:], strict=False):
        assert late - early >= 0.999, "ten a second, wherever they are sent from"


def demand(cap: int, wanted: int, requests: int = 1) -> dict[str, Any]:
    return {"h": (cap, cap, wanted, requests, 0.0, "")}


def test_a_dead_workers_share_comes_back_after_its_lease():
    now = 0.0
    limits = HostLimits(connections_per_host=4, requests_per_s_per_host=100.0, lease_s=30.0, clock=lambda: now)
    assert limits.exchange("dead", demand(0, 4), {})["h"][0] == 4
    assert limits.exchange("alive", demand(0, 4), {})["h"][0] == 0
    now = 29.9
    assert limits.exchange("alive", demand(0, 4), {})["h"][0] == 0
    now = 30.1
    assert limits.exchange("alive", demand(0, 4), {})["h"][0] == 4


def test_workers_share_evenly_and_what_one_does_not_need_is_the_others():
    now = 0.0
    limits = HostLimits(connections_per_host=8, requests_per_s_per_host=100.0, lease_s=30.0, clock=lambda: now)
    first = limits.exchange("a", demand(0, 8), {})["h"][0]
    assert first == 8
    assert limits.exchange("b", demand(0, 8), {})["h"][0] == 0
    now = 2.0
    first = limits.exchange("a", demand(first, 8), {})["h"][0]
    assert first == 4
    limits.exchange("a", demand(first, 8), {})
    second = limits.exchange("b", demand(0, 8), {})["h"][0]
    assert second == 4
    limits.exchange("a", demand(first, 1), {})
    limits.exchange("a", demand(1, 1), {})
    assert limits.exchange("b", demand(second, 8), {})["h"][0] == 7


def test_more_workers_than_connections_take_turns():
    now = 0.0
    limits = HostLimits(connections_per_host=1, requests_per_s_per_host=100.0, lease_s=30.0, clock=lambda: now)
    caps = dict.fromkeys("abc", 0)
    held = dict.fromkeys("abc", 0.0)
    for _ in range(300):
        now += 0.1
        for worker in caps:
            caps[worker] = limits.exchange(worker, demand(caps[worker], 5), {})["h"][0]
            held[worker] += caps[worker] * 0.1
        assert sum(caps.values()) <= 1
    assert min(held.values()) > 6 and sum(held.values()) > 25


def test_a_rest_that_one_worker_was_told_reaches_the_others():
    limits = HostLimits(connections_per_host=4, requests_per_s_per_host=100.0, lease_s=30.0)
    limits.exchange("a", {"h": (4, 4, 0, 0, 20.0, "http_429")}, {})
    reply = limits.exchange("b", demand(0, 1), {})["h"]
    assert reply[4] == pytest.approx(20, abs=0.5) and reply[5] == "http_429"


def test_the_report_adds_up_what_workers_say():
    limits = HostLimits(connections_per_host=4, requests_per_s_per_host=100.0, lease_s=30.0)
    limits.exchange("a", {}, {"in_flight": 3, "waiting": 1, "cooling": ["x"], "outage": False})
    limits.exchange("b", {}, {"in_flight": 4, "waiting": 0, "cooling": ["w"], "outage": "no host answers"})
    assert limits.report() == {"outage": "no host answers", "in_flight": 7, "waiting": 1, "cooling": ["w", "x"]}


def test_what_nobody_holds_any_more_is_forgotten():
    now = 0.0
    limits = HostLimits(connections_per_host=4, requests_per_s_per_host=100.0, lease_s=30.0, clock=lambda: now)
    for number in range(1000):
        name = f"host{number}"
        limits.exchange("a", {name: (0, 0, 1, 1, 0.0, "")}, {})
        now += 0.1
        limits.exchange("a", {name: (0, 0, 0, 0, 0.0, "")}, {})
    assert len(limits._hosts) <= 1


SLOWNESS_S = 0.01


def slow_ask(limits: HostLimits, threads: ThreadPoolExecutor) -> Any:
    """As far away as another process."""

    def exchange(method: str, *args: Any) -> Any:
        time.sleep(SLOWNESS_S)
        answer = getattr(limits, method)(*args)
        time.sleep(SLOWNESS_S)
        return answer

    def ask(method: str, *args: Any) -> "Future[Any]":
        return threads.submit(exchange, method, *args)

    return ask


@pytest.mark.slow
def test_fetchers_that_share_limits_never_exceed_them_together():
    shared = {"connections_per_host": 4, "requests_per_s_per_host": 40.0}
    limits = HostLimits(**limits_settings(**shared, deadline_s=2.0))
    ended: list[bytes | None] = []
    with web() as loopback, ThreadPoolExecutor(4) as threads:
        hosts = [loopback.open(f"127.0.5.{number}", Host(lambda path: [0.03, ok()])) for number in range(1, 4)]

        async def work(worker: int) -> None:
            settings = config(**shared, limit_allowed_networks=True, deadline_s=2.0, host_patience_s=60.0)
            async with Fetcher(settings, slow_ask(limits, threads)) as fetcher:
                rows = [f"{host.url}/{worker}/{row}" for host in hosts for row in range(25)]
                ended.extend(one.body for one in await fetch_all(fetcher, *rows))

        started = time.monotonic()
        workers = [threading.Thread(target=uvloop.run, args=[work(number)]) for number in range(4)]
        for thread in workers:
            thread.start()
        for thread in workers:
            thread.join()
        seconds = time.monotonic() - started
    assert ended == [BODY] * 300
    for host in hosts:
        times = sorted(at for at, _ in host.requests)
        assert host.most_open <= 4
        busiest = max(sum(1 for at in times if begin <= at < begin + 1) for begin in times)
        # Forty a second; beyond that, what the lateness of a tenth of a second allows each worker.
        assert busiest <= 40 + 0.1 * 40 + 4
    assert seconds < 300 / 3 / 40 + 6, "the shares are used"


SERVER = """
from multiprocessing.managers import BaseManager
from ingest.limits import HostLimits

limits = HostLimits(connections_per_host=2, requests_per_s_per_host=1000.0, lease_s=4.0)
BaseManager.register("limits", lambda: limits, exposed=["exchange"])
server = BaseManager(("127.0.0.1", 0), b"key").get_server()
print(server.address[1], flush=True)
server.serve_forever()
"""

WORKER = """
import sys, uvloop
from multiprocessing.managers import BaseManager
from ingest.fetch import Fetcher
from ingest.limits import local_ask
from tests.ingest.web import config, fetch_all

BaseManager.register("limits")
manager = BaseManager(("127.0.0.1", int(sys.argv[1])), b"key")
manager.connect()

async def work():
    settings = config(connections_per_host=2, limit_allowed_networks=True, requests_per_s_per_host=1000.0)
    async with Fetcher(settings, local_ask(manager.limits())) as fetcher:
        rows = await fetch_all(fetcher, *(f"{sys.argv[2]}/{row}" for row in range(int(sys.argv[3]))))
        assert all(row.body for row in rows), rows

uvloop.run(work())
"""


def python(code: str, *arguments: object, **options: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], text=True, **options)


@pytest.mark.slow
def test_a_killed_workers_connections_are_taken_over_when_its_lease_ends():
    with web() as loopback, python(SERVER, stdout=subprocess.PIPE) as limits:
        assert limits.stdout is not None
        port = limits.stdout.readline().strip()
        host = loopback.open("127.0.5.1", Host(lambda path: [0.2, ok()]))
        with python(WORKER, port, host.url, 500) as doomed:
            while len(host.requests) < 4:
                assert doomed.poll() is None
                time.sleep(0.01)
            doomed.kill()
        killed_at, asked = time.monotonic(), len(host.requests)
        with python(WORKER, port, host.url, 6) as heir:
            assert heir.wait(20) == 0
        limits.kill()
    assert 2.0 < host.requests[asked][0] - killed_at < 6.0
    assert len(host.requests) == asked + 7
    assert host.most_open == 2


def test_an_ask_that_fails_for_a_moment_loses_no_row():
    limits = HostLimits(**limits_settings(4, 1000.0, 2.0))
    asked = 0

    def ask(method: str, *args: Any) -> "Future[Any]":
        nonlocal asked
        asked += 1
        if asked == 1:
            raise ConnectionError("the other process is not there yet")
        return local_ask(limits)(method, *args)

    with web() as loopback:
        host = loopback.open("127.0.5.1")

        async def run() -> list[bytes | None]:
            async with Fetcher(config(limit_allowed_networks=True), ask) as fetcher:
                return [one.body for one in await fetch_all(fetcher, *(f"{host.url}/{row}" for row in range(5)))]

        assert asyncio.run(run()) == [BODY] * 5
