"""A web of hostile hosts on loopback, and canaries where nobody may knock.

Every kind of trouble has an address of its own (127.0.1.n, all on one port), so that no host's failures make another
wait. What a host answers is a script of bytes to send, seconds to wait and endless repetitions. The canaries listen
beside them: on addresses outside the allowed network, and on other ports of addresses inside it.
"""

import asyncio
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

NETWORK = "127.0.1.0/24"
CANARY_ADDRESSES = ("127.0.0.1", "127.0.2.1", "::1", "127.0.1.250")


@dataclass(frozen=True)
class Endless:
    """`chunk` again and again, `every_s` apart, until nobody listens."""

    chunk: bytes
    every_s: float = 0.0


@dataclass(frozen=True)
class Reset:
    """A TCP reset in place of an end."""


Script = Sequence[bytes | float | Endless | Reset]
NOTHING_HERE: Script = (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",)


class HostileWeb:
    """`scripts`: what each path answers, on whichever host; the rest is 404. Runs in a thread of its own.

    `{port}` and `{canary}` in a redirect's target stand for the ports that are known once it listens.
    """

    def __init__(self, scripts: Mapping[str, Script]) -> None:
        self.requests: Counter[str] = Counter()
        self.heads: list[bytes] = []
        self.canary_contacts: list[str] = []
        self._scripts = scripts
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()

    async def _open(self) -> None:
        hosts = [f"127.0.1.{number}" for number in range(1, 241)]
        first = await asyncio.start_server(self._answer, hosts[0], 0, limit=1 << 21)
        self.port = int(first.sockets[0].getsockname()[1])
        rest = await asyncio.start_server(self._answer, hosts[1:], self.port, limit=1 << 21)
        canaries = []
        for address in CANARY_ADDRESSES:
            port = self.port if not address.startswith("127.0.1.") else 0
            canaries.append(await asyncio.start_server(self._alarm, address, port))
        self.canary_port = int(canaries[-1].sockets[0].getsockname()[1])
        canaries.append(await asyncio.start_server(self._alarm, hosts[0], self.canary_port))
        self._servers = [first, rest, *canaries]

    async def _alarm(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.canary_contacts.append(f"{writer.get_extra_info('sockname')} by {writer.get_extra_info('peername')}")
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            start = await reader.readexactly(1)
            if start == b"\x16":  # a TLS client's hello
                await self._play(writer, self._scripts.get("tls", ()))
                return
            head = start + await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ")[1].decode("latin-1").partition("?")[0]
            self.requests[path] += 1
            self.heads.append(head)
            await self._play(writer, self._scripts.get(path, NOTHING_HERE))
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _play(self, writer: asyncio.StreamWriter, script: Script) -> None:
        for step in script:
            if isinstance(step, bytes):
                if step.startswith(b"HTTP/1.1 302"):
                    step = step.replace(b"{port}", b"%d" % self.port).replace(b"{canary}", b"%d" % self.canary_port)
                writer.write(step)
                await writer.drain()
            elif isinstance(step, float):
                await asyncio.sleep(step)
            elif isinstance(step, Reset):
                raw = writer.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
                writer.transport.abort()
            else:
                while not writer.is_closing():
                    writer.write(step.chunk)
                    await writer.drain()
                    await asyncio.sleep(step.every_s)

    def close(self) -> None:
        async def end() -> None:
            for server in self._servers:
                server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextmanager
def hostile_web(scripts: Mapping[str, Script]) -> Iterator[HostileWeb]:
    web = HostileWeb(scripts)
    try:
        yield web
    finally:
        web.close()


def ok(body: bytes, headers: str = "", *, length: int | str | None = None) -> bytes:
    said = len(body) if length is None else length
    return f"HTTP/1.1 200 OK\r\nContent-Length: {said}\r\n{headers}\r\n".encode() + body


def to(location: str | bytes) -> bytes:
    target = location if isinstance(location, bytes) else location.encode()
    return b"HTTP/1.1 302 Found\r\nLocation: " + target + b"\r\nContent-Length: 0\r\n\r\n"


def chunked(*parts: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body + end
