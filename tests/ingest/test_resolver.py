import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterable

import pytest

from ingest.address import AddressPolicy, Refused
from ingest.resolver import Resolver, Unresolvable

PUBLIC = "93.184.215.14"


def resolve(look_up: Callable[[str], Iterable[str]], *names: str, timeout_s: float = 10.0) -> list[object]:
    """The addresses of each name, or the exception, asked for all at once."""

    async def ask() -> list[object]:
        resolver = Resolver(AddressPolicy(), look_up, timeout_s=timeout_s)
        try:
            found = await asyncio.gather(*(resolver.resolve(name, 80) for name in names), return_exceptions=True)
            return [error if isinstance(error, BaseException) else [str(a) for a in error.addresses] for error in found]
        finally:
            resolver.close()

    return asyncio.run(ask())


def test_a_name_with_one_private_address_is_refused_as_a_whole():
    answers = {"rebind.example": [PUBLIC, "10.0.0.1"], "good.example": [PUBLIC], "zone.example": ["fe80::1%2"]}
    rebind, good, zone = resolve(lambda name: answers[name], *answers)
    assert isinstance(rebind, Refused) and rebind.reason == "address_private"
    assert good == [PUBLIC]
    assert isinstance(zone, Refused) and zone.reason == "address_link_local"


def test_a_name_is_looked_up_once_for_all_who_ask_and_remembered():
    asked: list[str] = []

    def look_up(name: str) -> list[str]:
        asked.append(name)
        time.sleep(0.05)
        return [PUBLIC]

    async def ask() -> None:
        resolver = Resolver(AddressPolicy(), look_up)
        await asyncio.gather(*(resolver.resolve("a.example", 80) for _ in range(50)))
        await resolver.resolve("a.example", 443)
        resolver.close()

    asyncio.run(ask())
    assert asked == ["a.example"]


@pytest.mark.parametrize(
    ("error", "may_pass"),
    [
        (socket.gaierror(socket.EAI_NONAME, "no such name"), False),
        (socket.gaierror(socket.EAI_AGAIN, "the name server does not answer"), True),
        (OSError("no file left"), True),
        (UnicodeError("label too long"), False),
    ],
)
def test_that_there_is_no_such_name_differs_from_no_answer(error: Exception, may_pass: bool):
    asked: list[str] = []

    def look_up(name: str) -> list[str]:
        asked.append(name)
        raise error

    first, second = resolve(look_up, "x.example", "x.example")
    assert isinstance(first, Unresolvable) and isinstance(second, Unresolvable)
    assert first.may_pass is second.may_pass is may_pass
    assert asked == ["x.example"]


def test_lookups_at_a_time_are_bounded_and_one_that_hangs_is_given_up():
    release = threading.Event()
    running, most, lock = 0, 0, threading.Lock()

    def look_up(name: str) -> list[str]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        release.wait(5) if name.startswith("hangs") else time.sleep(0.002)
        with lock:
            running -= 1
        return [PUBLIC]

    started = time.monotonic()
    try:
        hung, *good = resolve(look_up, "hangs.example", *(f"n{i}.example" for i in range(500)), timeout_s=0.5)
    finally:
        release.set()
    assert isinstance(hung, Unresolvable) and hung.may_pass
    assert good == [[PUBLIC]] * 500
    assert 1 < most <= 96
    assert time.monotonic() - started < 4
