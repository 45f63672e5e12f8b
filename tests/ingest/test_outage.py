import asyncio
import logging
import socket
import time

import pytest
import uvloop

from cluster.errors import WorkFailed
from ingest.fetch import Fetched, Fetcher
from tests.ingest.web import BODY, Host, config, fetch_all, fetch_one, web

# So many hosts that their failing together is no accident.
HOSTS = 24
SETTINGS = {"respect_robots_txt": False, "deadline_s": 1.0, "attempts": 2, "host_patience_s": 20.0}


def test_when_all_hosts_fail_at_once_fetching_waits_and_charges_nobody(caplog: pytest.LogCaptureFixture):
    with web() as loopback:
        hosts = [loopback.open(f"127.0.5.{number}") for number in range(1, HOSTS + 1)]

        async def run() -> tuple[list[Fetched], list[object]]:
            async with Fetcher(config(**SETTINGS)) as fetcher:
                before = await fetch_all(fetcher, *(f"{host.url}/before" for host in hosts))
                assert all(one.body == BODY for one in before)
                ports = [loopback.shut(host) for host in hosts]
                rows = [
                    asyncio.create_task(fetch_one(fetcher, f"{host.url}/{row}")) for host in hosts for row in range(5)
                ]
                await asyncio.sleep(1.0)
                said = [fetcher.state()["outage"], any(row.done() for row in rows)]
                for host, port in zip(hosts, ports, strict=True):
                    loopback.open(host.url.split("/")[2].partition(":")[0], host, port=port)
                ended = await asyncio.gather(*rows)
                return ended, [*said, fetcher.state()["outage"]]

        with caplog.at_level(logging.WARNING, "ingest.outage"):
            ended, said = uvloop.run(run())
    assert isinstance(said[0], str) and "no host answers" in said[0]
    assert said[1:] == [False, False]
    assert [(one.body, one.attempts) for one in ended] == [(BODY, 1)] * len(ended)
    assert [record.message.partition(":")[0].split(" over")[0] for record in caplog.records] == ["outage", "outage"]


def test_a_tail_of_dead_hosts_is_no_outage_while_a_good_one_can_be_reached():
    with web() as loopback:
        good = loopback.open("127.0.5.1")
        dead = [loopback.open(f"127.0.6.{number}") for number in range(1, HOSTS + 1)]
        for host in dead:
            loopback.shut(host)

        async def run() -> tuple[list[Fetched], float]:
            async with Fetcher(config(**SETTINGS)) as fetcher:
                assert (await fetch_one(fetcher, f"{good.url}/x")).body == BODY
                started = time.monotonic()
                ended = await fetch_all(fetcher, *(f"{host.url}/x" for host in dead))
                assert fetcher.state()["outage"] is False
                return ended, time.monotonic() - started

        ended, seconds = uvloop.run(run())
    assert {(one.reason, one.attempts) for one in ended} == {("connection_failed", 2)}
    assert good.paths == ["/x"], "it was connected to, not asked for anything"
    assert seconds < 5


def test_a_few_dead_hosts_alone_end_soon():
    with web() as loopback:
        dead = [loopback.open(f"127.0.6.{number}") for number in range(1, 6)]
        for host in dead:
            loopback.shut(host)

        async def run() -> list[Fetched]:
            async with Fetcher(config(**SETTINGS)) as fetcher:
                return await fetch_all(fetcher, *(f"{host.url}/x" for host in dead))

        started = time.monotonic()
        ended = uvloop.run(run())
    assert {one.reason for one in ended} == {"connection_failed"}
    assert time.monotonic() - started < 2


def test_a_name_server_that_does_not_answer_is_an_outage_until_it_does():
    down = True

    def look_up(name: str) -> list[str]:
        if down:
            raise socket.gaierror(socket.EAI_AGAIN, "temporary failure in name resolution")
        return ["127.0.5.1"]

    with web() as loopback:
        host = loopback.open("127.0.5.1")
        port = host.url.rpartition(":")[2]

        async def run() -> list[Fetched]:
            nonlocal down
            async with Fetcher(config(**SETTINGS), look_up=look_up) as fetcher:
                names = [f"http://host{number}.example:{port}/x" for number in range(HOSTS)]
                rows = [asyncio.create_task(fetch_one(fetcher, url)) for url in names]
                await asyncio.sleep(1.0)
                assert fetcher.state()["outage"]
                down = False
                return await asyncio.gather(*rows)

        ended = uvloop.run(run())
    assert [(one.body, one.attempts) for one in ended] == [(BODY, 1)] * HOSTS


def test_an_outage_that_outlasts_patience_stops_the_work_and_says_what_to_do():
    with web() as loopback:
        dead = [loopback.open(f"127.0.6.{number}", Host()) for number in range(1, HOSTS + 1)]
        for host in dead:
            loopback.shut(host)

        async def run() -> list[Fetched | BaseException]:
            async with Fetcher(config(**SETTINGS, outage_patience_s=1.0)) as fetcher:
                rows = (fetch_one(fetcher, f"{host.url}/{row}") for host in dead for row in range(3))
                ended = await asyncio.gather(*rows, return_exceptions=True)
                with pytest.raises(WorkFailed):
                    await fetch_one(fetcher, f"{dead[0].url}/later")
                return ended

        started = time.monotonic()
        ended = uvloop.run(run())
    assert all(isinstance(one, WorkFailed) and "start the run again" in str(one) for one in ended)
    assert time.monotonic() - started < 6
