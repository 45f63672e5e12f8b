"""The web of the benchmark: pictures answered from memory, by a process of its own, so that its CPU time is known.

    /<milliseconds>/<number>.jpg     the picture, after that delay
    /-/take                          what was seen since the last take, as JSON; forgets it
    anything else                    404 (robots.txt too: everything is allowed)

A connection to one of `DEAD` is accepted and never answered. Run as `python -m benchmarks.ingest.server FOLDER`; prints
its port when it listens, ends when its standard input does.
"""

import asyncio
import ipaddress
import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any, Self

import psutil
import uvloop

DEAD = ipaddress.IPv4Network("127.64.0.0/10")
SAMPLE_S = 0.01
_MISSING = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"


class Seen:
    """What the server saw: requests open (read and unanswered) every `SAMPLE_S`, and when each was answered."""

    def __init__(self) -> None:
        self.open = 0
        self.forget()

    def forget(self) -> None:
        self.samples: list[tuple[float, int]] = []
        self.peak = self.open
        self.requests: list[float] = []
        self.answers: list[float] = []
        self.connections = 0

    def plain(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "peak": self.peak,
            "requests": self.requests,
            "answers": self.answers,
            "connections": self.connections,
        }


class Answering(asyncio.Protocol):
    """One connection."""

    def __init__(self, pictures: list[bytes], seen: Seen) -> None:
        self._pictures = pictures
        self._seen = seen
        self._head = b""
        self._waiting: set[asyncio.TimerHandle] = set()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._dead = ipaddress.IPv4Address(transport.get_extra_info("sockname")[0]) in DEAD
        self._seen.connections += 1

    def data_received(self, data: bytes) -> None:
        if self._dead:
            return
        self._head += data
        while (end := self._head.find(b"\r\n\r\n")) >= 0:
            head, self._head = self._head[:end], self._head[end + 4 :]
            self._answer(head)

    def connection_lost(self, error: Exception | None) -> None:
        for handle in self._waiting:
            handle.cancel()
        self._seen.open -= len(self._waiting)

    def _answer(self, head: bytes) -> None:
        path = head.split(b" ", 2)[1]
        close = b"\r\nconnection: close" in head.lower()
        delay, _, name = path[1:].partition(b"/")
        if path == b"/-/take":
            body = json.dumps(self._seen.plain()).encode()
            self._seen.forget()
            self._transport.write(_ok(body))
            return
        if not name.endswith(b".jpg"):
            self._transport.write(_MISSING)
            return
        seen = self._seen
        seen.requests.append(time.monotonic())
        answer = self._pictures[int(name[:-4])]
        if delay == b"0":
            self._send(answer, close)
            return
        seen.open += 1
        seen.peak = max(seen.peak, seen.open)

        def late() -> None:
            self._waiting.discard(handle)
            seen.open -= 1
            self._send(answer, close)

        handle = asyncio.get_running_loop().call_later(int(delay) / 1000, late)
        self._waiting.add(handle)

    def _send(self, answer: bytes, close: bool) -> None:
        self._transport.write(answer)
        self._seen.answers.append(time.monotonic())
        if close:
            self._transport.close()


def _ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(body) + body


class PictureServer:
    """The server's process, as its clients' parent sees it. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "benchmarks.ingest.server", str(self._folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self._cpu = psutil.Process(self._process.pid)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def cpu_s(self) -> float:
        times = self._cpu.cpu_times()
        return float(times.user + times.system)

    def take(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/take") as answer:
            taken: dict[str, Any] = json.load(answer)
        return taken

    def url(self, number: int, *, host: str = "127.0.0.1", delay_ms: int = 0) -> str:
        return f"http://{host}:{self.port}/{delay_ms}/{number}.jpg"


async def _serve(folder: Path) -> None:
    pictures = [_ok(path.read_bytes()) for path in sorted(folder.glob("*.jpg"))]
    seen = Seen()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Answering(pictures, seen), "0.0.0.0", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)

    def sample() -> None:
        if seen.open:
            seen.samples.append((time.monotonic(), seen.open))
        loop.call_later(SAMPLE_S, sample)

    sample()
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    uvloop.run(_serve(Path(sys.argv[1])))
