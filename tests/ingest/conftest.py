"""What the ingest tests share: a hostile HTTP server on a free loopback port, and workshops to build artifacts in."""

import asyncio
import gzip
import io
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from cluster.artifact import Request
from cluster.storage import Folder
from cluster.workshop import Workshop, begin


def jpeg(size: tuple[int, int] = (64, 48), colour: tuple[int, int, int] = (200, 30, 40)) -> bytes:
    packed = io.BytesIO()
    Image.new("RGB", size, colour).save(packed, "JPEG", quality=95)
    return packed.getvalue()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class HostileServer:
    """Answers each path with the raw bytes it was given, and counts who asked for what."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.heads: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._answer, "127.0.0.1", 0), self._loop
        ).result()
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        picture = jpeg()
        self.picture = picture
        packed = gzip.compress(picture)
        bomb = gzip.compress(bytes(50_000_000))
        self.answers: dict[str, list[bytes | float]] = {
            "/good": [self.ok(picture)],
            "/gzip": [self.ok(packed, "Content-Encoding: gzip\r\n")],
            "/bomb": [self.ok(bomb, "Content-Encoding: gzip\r\n")],
            "/cut_gzip": [self.ok(packed[: len(packed) // 2], "Content-Encoding: gzip\r\n")],
            "/brotli": [self.ok(picture, "Content-Encoding: br\r\n")],
            "/truncated": [self.ok(picture, length=len(picture) + 100)],
            "/cut_chunks": [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\n0123456789abcdef\r\n"],
            "/empty": [self.ok(b"")],
            "/declared_large": [self.ok(picture, length=1 << 40)],
            "/endless": [b"HTTP/1.1 200 OK\r\n\r\n" + bytes(300_000)],
            "/drip": [self.ok(b"", length=1000), *[x for _ in range(200) for x in (b"x", 0.05)]],
            "/silent": [30.0],
            "/garbage": [b"\x00\x01 this is not HTTP\r\n\r\n"],
            "/reset": [],
            "/noai": [self.ok(picture, "X-Robots-Tag: NoAI, nofollow\r\n")],
            "/named_noindex": [self.ok(picture, "X-Robots-Tag: googlebot: noindex\r\n")],
            "/to_good": [self.redirect("/good")],
            "/to_private": [self.redirect("http://10.0.0.1/x.jpg")],
            "/to_metadata": [self.redirect("http://169.254.169.254/latest/meta-data")],
            "/to_file": [self.redirect("file:///etc/passwd")],
            "/to_odd_spelling": [self.redirect("http://2130706433/")],
            "/to_credentials": [self.redirect("http://me:secret@example.com/")],
            "/loop": [self.redirect("/loop")],
            "/no_location": [b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n"],
        }
        for hop in range(1, 7):
            self.answers[f"/hop{hop}"] = [self.redirect(f"/hop{hop - 1}" if hop > 1 else "/good")]
        for status in (400, 404, 410, 429, 500, 503):
            self.answers[f"/{status}"] = [f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n".encode()]

    @staticmethod
    def ok(body: bytes, headers: str = "", *, length: int | None = None) -> bytes:
        length = len(body) if length is None else length
        return f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n{headers}\r\n".encode() + body

    @staticmethod
    def redirect(location: str) -> bytes:
        return f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            path = head.split(" ")[1]
            self.requests[path] += 1
            self.heads.append(head)
            script = self.answers.get(path, self.answers["/404"])
            if path == "/flaky" and self.requests[path] < 3:
                script = self.answers["/503"]
            elif path == "/flaky":
                script = self.answers["/good"]
            for step in script:
                if isinstance(step, bytes):
                    writer.write(step)
                    await writer.drain()
                else:
                    await asyncio.sleep(step)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    def close(self) -> None:
        async def end() -> None:
            self._server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="module")
def hostile() -> Iterator[HostileServer]:
    server = HostileServer()
    yield server
    server.close()


@pytest.fixture
def workshop(tmp_path: Path) -> Callable[[str], Workshop]:
    def open_workshop(kind: str) -> Workshop:
        return begin(Folder(tmp_path / kind), Request(kind, 1, {}, {}), {})

    return open_workshop
