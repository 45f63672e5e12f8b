import asyncio

import pytest
import uvloop

from ingest.fetch import Fetcher
from ingest.outcome import Status
from tests.ingest.web import BODY, Host, config, fetch, fetch_all, fetch_one, ok, web

RULES = b"""
User-agent: othercrawler
Disallow: /

User-agent: *
Disallow: /private/
Allow: /private/open$
Disallow: /*.gif$
"""


def with_robots(*script: bytes | float) -> Host:
    return Host(robots=lambda: list(script))


def test_rules_decide_which_rows_are_fetched_and_are_asked_for_once():
    with web() as loopback:
        host = loopback.open("127.0.5.1", with_robots(ok(RULES)))
        paths = ["/a.jpg", "/private/a.jpg", "/private/open", "/a.gif", "/a.gif?x"] * 10
        fetched = fetch(*(host.url + path for path in paths))
    assert [one.reason for one in fetched[:5]] == [None, "robots_txt", None, "robots_txt", None]
    assert {one.status for one in fetched if one.reason} == {Status.REFUSED}
    assert host.asked("/robots.txt") == 1
    assert host.asked("/private/a.jpg") == host.asked("/a.gif") == 0


def test_a_group_for_our_own_name_goes_before_the_one_for_all():
    rules = b"User-agent: *\nDisallow: /\n\nUser-agent: Unclip\nDisallow: /no/\n"
    with web() as loopback:
        host = loopback.open("127.0.5.1", with_robots(ok(rules)))
        fetched = fetch(f"{host.url}/yes", f"{host.url}/no/x")
    assert [one.reason for one in fetched] == [None, "robots_txt"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ([ok(b"", status="404 Not Found")], None),
        ([ok(b"", status="403 Forbidden")], None),
        ([ok(b"")], None),
        ([ok(b"\xff\xfe\x00 not robots at all")], None),
        ([ok(b"User-agent: *\nDisallow: /x\n" + b"# " + b"x" * 600_000)], "robots_txt"),
        ([ok(b"# " + b"x" * 600_000 + b"\nUser-agent: *\nDisallow: /x\n")], None),
        ([ok(b"", "Location: /robots.txt\r\n", "302 Found")], None),
        ([ok(b"", status="500 Broken")], "robots_unavailable"),
        ([ok(b"", status="429 Slow")], "robots_unavailable"),
        ([ok(b"", "Location: http://10.0.0.1/robots.txt\r\n", "302 Found")], "robots_unavailable"),
        ([b"this is not HTTP\r\n\r\n"], "robots_unavailable"),
        ([], "connection_cut"),
        (None, "deadline"),
    ],
)
def test_what_other_answers_mean(answer: list[bytes | float] | None, reason: str | None):
    with web() as loopback:
        host = loopback.open("127.0.5.1", Host(robots=lambda: answer))
        fetched = fetch(f"{host.url}/x", f"{host.url}/x", deadline_s=1.0)
    assert [one.reason for one in fetched] == [reason, reason]
    assert host.asked("/x") == (2 if reason is None else 0)


def test_rules_that_could_not_be_had_are_asked_for_again_after_a_while():
    answers = [[ok(b"", status="500 Broken")]] * 3

    with web() as loopback:
        host = loopback.open("127.0.5.1", Host(robots=lambda: answers.pop() if answers else [ok(RULES)]))

        async def run() -> list[str | None]:
            async with Fetcher(config(host_cooldown_s=0.3)) as fetcher:
                first = await fetch_all(fetcher, *[f"{host.url}/x"] * 5)
                asked = host.asked("/robots.txt")
                second = await fetch_one(fetcher, f"{host.url}/x")
                assert host.asked("/robots.txt") == asked == 3
                await asyncio.sleep(0.35)
                third = await fetch_one(fetcher, f"{host.url}/x")
                return [*{one.reason for one in first}, second.reason, third.reason]

        assert uvloop.run(run()) == ["robots_unavailable", "robots_unavailable", None]


def test_the_rules_of_every_hop_are_heeded():
    with web() as loopback:
        forbidden = loopback.open("127.0.5.2", with_robots(ok(b"User-agent: *\nDisallow: /")))
        moved = ok(b"", f"Location: {forbidden.url}/x\r\n", "302 Found")
        first = loopback.open("127.0.5.1", Host(lambda path: [moved]))
        assert fetch(f"{first.url}/x")[0].reason == "robots_txt"
    assert forbidden.paths == ["/robots.txt"]


def test_switched_off_nobody_asks_for_them():
    with web() as loopback:
        host = loopback.open("127.0.5.1", with_robots(ok(b"User-agent: *\nDisallow: /")))
        assert fetch(f"{host.url}/x", respect_robots_txt=False)[0].body == BODY
    assert host.paths == ["/x"]
