import asyncio
import gzip
import ipaddress
import ssl
import subprocess
import time
import zlib
from pathlib import Path

import pytest
import uvloop

from ingest.fetch import Fetched, Fetcher
from tests.ingest.web import BODY, Host, Script, Web, config, fetch, fetch_all, fetch_one, ok, web

OK = b"HTTP/1.1 200 OK\r\n"


def answered(*script: bytes | float, **settings: object) -> Fetched:
    """What becomes of a row whose host plays the script."""
    with web() as loopback:
        host = loopback.open("127.0.5.1", Host(lambda path: list(script)))
        return fetch(f"{host.url}/x", respect_robots_txt=False, **settings)[0]


@pytest.mark.parametrize(
    "script",
    [
        [OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\npic\r\n", 0.02, b"4\r\nture\r\n0\r\n\r\n"],
        [OK + b"Transfer-Encoding: chunked\r\n\r\n7;x=y\r\npicture\r\n0\r\nTrailer: x\r\n\r\n"],
        [b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + ok()],
        [b"HTTP/1.1 100 Continue\r\n\r\n", 0.02, ok()],
        [OK + b"\r\npic", 0.02, b"ture", b""],
        [b"HTTP/1.0 200 OK\r\n\r\npicture", b""],
        [*(bytes([letter]) for letter in ok())],
        [ok(gzip.compress(b"pic") + gzip.compress(b"ture"), "Content-Encoding: gzip\r\n")],
        [ok(gzip.compress(BODY) + bytes(8), "Content-Encoding: x-gzip\r\n")],
        [ok(zlib.compress(BODY), "Content-Encoding: deflate\r\n")],
        [ok(zlib.compress(BODY, wbits=-15), "Content-Encoding: deflate\r\n")],
        [ok(headers="content-encoding: IDENTITY\r\n")],
    ],
)
def test_however_a_body_is_framed_it_is_the_body(script: Script):
    assert answered(*script).body == BODY


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ([OK + b"Content-Length: 70\r\n\r\npicture", b""], "connection_cut"),
        ([OK + b"Transfer-Encoding: chunked\r\n\r\n7\r\npicture\r\n", b""], "connection_cut"),
        ([OK + b"Content-Le", b""], "connection_cut"),
        ([OK + b"Content-Length: 7\r\nContent-Length: 8\r\n\r\npicture"], "bad_response"),
        ([OK + b"Content-Length: 7\r\nTransfer-Encoding: chunked\r\n\r\n7\r\npicture\r\n0\r\n\r\n"], "bad_response"),
        ([OK + b"Content-Length: -7\r\n\r\npicture"], "bad_response"),
        ([OK + b"Content-Length: 9" + b"9" * 40 + b"\r\n\r\npicture"], "bad_response"),
        ([OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\npicture\r\n0\r\n\r\n"], "bad_response"),
        ([b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"], "bad_response"),
        ([b"HTTP/1.1 204 No Content\r\n\r\n"], "http_204"),
        ([OK + b"X: " + b"y" * 70_000 + b"\r\n\r\n"], "header_too_large"),
        ([OK + b"".join(b"X-%d: y\r\n" % number for number in range(9000)) + b"\r\n"], "header_too_large"),
        ([OK + b"X: " + b"y" * 60_000, 0.02, b"y" * 60_000], "header_too_large"),
        ([b"HTTP/1.1 103 Early Hints\r\nX: " + b"y" * 30_000 + b"\r\n\r\n"] * 3 + [ok()], "header_too_large"),
        ([OK, *[step for _ in range(400) for step in (b"X: y\r\n", 0.02)]], "too_slow"),
        ([OK + b"Content-Length: 9999\r\n\r\n", *[step for _ in range(400) for step in (b"x", 0.02)]], "too_slow"),
        ([OK + b"Content-Length: 9999\r\n\r\npic"], "too_slow"),
        ([1.9, *[step for _ in range(99) for step in (b"H", 0.02)]], "bad_response"),
        ([1.7, OK, *[step for _ in range(99) for step in (b"X: y\r\n", 0.02)]], "deadline"),
        ([ok(b"x" * 40, "Content-Encoding: gzip\r\n")], "content_encoding"),
        ([ok(gzip.compress(bytes(90_000_000)), "Content-Encoding: gzip\r\n")], "body_too_large_decompressed"),
    ],
)
def test_what_is_wrong_with_an_answer_has_its_name(script: Script, reason: str):
    started = time.monotonic()
    fetched = answered(*script, attempts=1)
    assert (fetched.body, fetched.reason) == (None, reason)
    assert time.monotonic() - started < 3


def test_connections_are_kept_and_one_that_was_closed_meanwhile_costs_no_attempt():
    with web() as loopback:
        host = loopback.open("127.0.5.1", Host(lambda path: [ok()]))
        closing = loopback.open("127.0.5.2")
        closing.answer = lambda path: [] if closing.asked(path) == 1 and path == "/stale" else [ok()]

        async def run() -> list[Fetched]:
            async with Fetcher(config(respect_robots_txt=False)) as fetcher:
                for row in range(20):
                    assert (await fetch_one(fetcher, f"{host.url}/{row}")).body == BODY
                assert (await fetch_one(fetcher, f"{closing.url}/first")).body == BODY
                # The server closes instead of answering the second request on the connection.
                return [await fetch_one(fetcher, f"{closing.url}/stale")]

        fetched = uvloop.run(run())[0]
    assert host.accepted == 1
    assert (fetched.body, fetched.attempts, closing.accepted, closing.asked("/stale")) == (BODY, 1, 2, 2)


def test_bytes_that_nobody_asked_for_close_the_connection():
    with web() as loopback:
        host = loopback.open(
            "127.0.5.1", Host(lambda path: [ok() + b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nevil!"])
        )

        async def run() -> list[bytes | None]:
            async with Fetcher(config(respect_robots_txt=False)) as fetcher:
                return [(await fetch_one(fetcher, f"{host.url}/{row}")).body for row in range(3)]

        assert uvloop.run(run()) == [BODY] * 3
    assert host.accepted == 3


def test_bodies_wait_for_room_and_that_counts_against_nobodys_deadline():
    picture = bytes(400_000)
    with web() as loopback:
        host = loopback.open("127.0.5.1", Host(lambda path: [ok(picture)]))
        most = 0

        async def run() -> list[str | None]:
            nonlocal most
            async with Fetcher(config(buffered_bytes=1_000_000, deadline_s=0.7, respect_robots_txt=False)) as fetcher:

                async def use(row: int) -> str | None:
                    nonlocal most
                    async with fetcher.fetched(f"{host.url}/{row}") as fetched:
                        most = max(most, fetcher.state()["buffered_bytes"])
                        await asyncio.sleep(0.06)  # as long as decoding takes
                        return fetched.reason

                reasons = await asyncio.gather(*(use(row) for row in range(40)))
                assert fetcher.state()["buffered_bytes"] == 0
                return reasons

        started = time.monotonic()
        reasons = uvloop.run(run())
    assert reasons == [None] * 40
    assert time.monotonic() - started > 0.7, "the test is one: rows waited longer than their deadline"
    assert most <= 1_000_000 + 262_144 + 400_000


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of pictures.example, signed by itself; certificate and key in one file."""
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=pictures.example", "-addext", "subjectAltName=DNS:pictures.example",
         "-keyout", str(file.with_suffix(".key")), "-out", str(file)],
        check=True, capture_output=True,
    )  # fmt: skip
    return file


def tls_host(loopback: Web, address: str, certificate: Path) -> tuple[Host, list[str | None]]:
    named: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    context.sni_callback = lambda socket, name, context: named.append(name)
    return loopback.open(address, Host(), tls=context), named


def test_tls_is_verified_for_the_name_and_connects_to_the_checked_address(certificate: Path):
    with web() as loopback:
        host, named = tls_host(loopback, "127.0.5.1", certificate)
        port = host.url.rpartition(":")[2]
        trust = ssl.create_default_context(cafile=str(certificate))
        urls = [f"https://pictures.example:{port}/x", f"https://other.example:{port}/x", f"{host.url}/x"]
        right, wrong_name, no_name = fetch(*urls, look_up=lambda name: ["127.0.5.1"], trust=trust)
        untrusted = fetch(urls[0], look_up=lambda name: ["127.0.5.1"])[0]
    assert right.body == BODY and right.host == f"pictures.example:{port}"
    assert [one.reason for one in (wrong_name, no_name, untrusted)] == ["tls"] * 3
    assert "pictures.example" in named
    assert set(host.paths) == {"/robots.txt", "/x"} and len(host.paths) == 2


def test_a_name_that_turns_private_after_its_check_is_never_connected_to():
    """Rebinding: good for the check, loopback for the connection. Here 127.0.5.1 is the allowed and .2 the private."""
    answers = ["127.0.5.1", "127.0.6.1"]
    with web() as loopback:
        good = loopback.open("127.0.5.1")
        port = int(good.url.rpartition(":")[2])
        private = loopback.open("127.0.6.1", port=port)

        def look_up(name: str) -> list[str]:
            return [answers.pop(0) if len(answers) > 1 else answers[0]]

        settings = {"allow_networks": ("127.0.5.0/24",), "look_up": look_up}
        fetched = fetch(*[f"http://rebind.example:{port}/{row}" for row in range(20)], **settings)
        assert [one.body for one in fetched] == [BODY] * 20
        again = fetch(f"http://rebind.example:{port}/again", **settings)[0]
    assert again.reason == "address_loopback"
    assert private.accepted == 0


class _Proxy:
    """Tunnels to wherever it is told, and remembers where."""

    def __init__(self) -> None:
        self.targets: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, target, _ = head.split(" ", 2)
        assert method == "CONNECT"
        self.targets.append(target)
        address, _, port = target.rpartition(":")
        there, back = await asyncio.open_connection(str(ipaddress.ip_address(address)), int(port))
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            try:
                while data := await source.read(65536):
                    sink.write(data)
            except ConnectionError:
                pass  # the client gives its connections up without ceremony
            finally:
                sink.close()

        await asyncio.gather(copy(reader, back), copy(there, writer), return_exceptions=True)


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_proxy_is_told_the_checked_address_for_both_schemes(certificate: Path, loop: object):
    proxy = _Proxy()
    with web() as loopback:
        plain = loopback.open("127.0.5.1")
        secure, _ = tls_host(loopback, "127.0.5.2", certificate)
        ports = [host.url.rpartition(":")[2] for host in (plain, secure)]
        addresses = {"plain.example": "127.0.5.1", "pictures.example": "127.0.5.2"}

        async def run() -> list[Fetched]:
            server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
            settings = config(proxy=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            trust = ssl.create_default_context(cafile=str(certificate))
            urls = [f"http://plain.example:{ports[0]}/x", f"https://pictures.example:{ports[1]}/x", "http://10.0.0.1/x"]
            async with server:
                async with Fetcher(settings, look_up=lambda name: [addresses[name]], trust=trust) as fetcher:
                    ended = await fetch_all(fetcher, *urls)
                while len(asyncio.all_tasks()) > 1:  # the proxy's ends
                    await asyncio.sleep(0.01)
                return ended

        with asyncio.Runner(loop_factory=loop) as runner:  # type: ignore[arg-type]
            through, secured, refused = runner.run(run())
    assert (through.body, secured.body, refused.reason) == (BODY, BODY, "address_private")
    assert set(proxy.targets) == {f"127.0.5.1:{ports[0]}", f"127.0.5.2:{ports[1]}"}


def test_a_proxy_that_refuses_is_a_failed_connection():
    with web() as loopback:
        proxy = loopback.open("127.0.5.1", Host(lambda path: [ok(b"", status="403 Forbidden")]))
        assert fetch("http://127.0.5.2/x", proxy=proxy.url, attempts=1)[0].reason == "connection_failed"


@pytest.mark.parametrize(
    "path", ["/a%0d%0aX-Evil:%201", "/%00", "/\u00e9\u4e2d?q=\u2028", "/a%2", "/%zz", "/a'\"<>`{}|^"]
)
def test_no_url_puts_anything_else_into_the_request(path: str):
    with web() as loopback:
        host = loopback.open("127.0.5.1")
        assert fetch(host.url + path, respect_robots_txt=False)[0].body == BODY
    lines = host.heads[0].split("\r\n")
    assert [line.partition(":")[0] for line in lines[1:]] == ["Host", "User-Agent", "Accept", "Accept-Encoding"]
    assert lines[0].startswith("GET /") and lines[0].endswith(" HTTP/1.1") and lines[0].isascii()
    assert lines[0].count(" ") == 2
