import socketserver
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import uvloop

from ingest.fetch import Fetcher
from tests.ingest.web import BODY, Host, config, fetch, fetch_all, ok, web


class _Small(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
def test_a_server_with_room_for_five_waiting_connections_loses_no_row():
    """The server of Python's standard library: a thread a connection, and a backlog of five."""
    assert socketserver.TCPServer.request_queue_size == 5
    with ThreadingHTTPServer(("127.0.5.1", 0), _Small) as server:
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started = time.monotonic()
        rows = [f"http://127.0.5.1:{server.server_port}/{row}" for row in range(2000)]
        fetched = fetch(*rows, deadline_s=10.0, concurrency=1024)
        seconds = time.monotonic() - started
        server.shutdown()
    assert [(one.body, one.attempts) for one in fetched] == [(BODY, 1)] * 2000
    assert seconds < 10


@pytest.mark.slow
def test_where_latency_is_high_hundreds_are_soon_in_flight():
    with web() as loopback:
        host = loopback.open("127.0.5.1", Host(lambda path: [0.2, ok()]))

        async def run() -> float:
            async with Fetcher(config(deadline_s=10.0)) as fetcher:
                started = time.monotonic()
                ended = await fetch_all(fetcher, *(f"{host.url}/{row}" for row in range(3000)))
                assert all(one.body == BODY for one in ended)
                return time.monotonic() - started

        seconds = uvloop.run(run())
    assert host.most_open >= 500
    reached = next(at for number, (at, _) in enumerate(host.requests) if number == 1000)
    assert reached - host.requests[0][0] < 4
    assert seconds < 10


def test_connections_to_a_host_that_answers_slowly_are_opened_a_few_at_a_time():
    accepted_by: list[tuple[float, int]] = []
    with web() as loopback:
        host = loopback.open("127.0.5.1")

        def answer(path: str) -> list[bytes | float]:
            accepted_by.append((time.monotonic(), host.accepted))
            return [0.1, ok()]

        host.answer = answer
        fetched = fetch(*(f"{host.url}/{row}" for row in range(300)), respect_robots_txt=False)
    assert all(one.body == BODY for one in fetched)
    started = accepted_by[0][0]
    early = max(accepted for at, accepted in accepted_by if at < started + 0.08)
    assert early <= 5, "no more than a few before anything was answered"
    assert host.accepted < 300
