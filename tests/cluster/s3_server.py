"""An S3 API on loopback with faults on demand: moto behind a few lines of WSGI. Prints its port.

POST /__faults__   {"method": "PUT", "path": "receipts/", "skip": 2, "times": 1, "how": "500"}

500, 503   refused with that status                lost        done, but the answer is a 500
cut        the answer ends in its middle           none        every fault is over; the answer counts requests
"""

import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

ERROR = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>on purpose</Message></Error>"
CODES = {"500": b"InternalError", "503": b"ServiceUnavailable", "lost": b"InternalError"}
Start = Callable[..., Any]


class Faulty:
    """Answers as moto does, except where it was told otherwise."""

    def __init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._plan: dict[str, Any] | None = None
        self._requests = 0
        # moto looks whether an object is there and then stores it, in two steps; S3 does both in one.
        self._one_at_a_time = threading.Lock()

    def __call__(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/__faults__":
            return self._told(environ, start)
        how = self._due(environ)
        if how in ("500", "503"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            return _refuse(start, how)
        with self._one_at_a_time:
            if how == "lost":
                list(self._moto(environ, lambda *_: None))
                return _refuse(start, how)
            body = b"".join(self._moto(environ, start))
        return _cut(body) if how == "cut" else [body]

    def _told(self, environ: dict[str, Any], start: Start) -> list[bytes]:
        plan = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
        with self._lock:
            self._plan = None if plan["how"] == "none" else plan
            answer, self._requests = json.dumps({"requests": self._requests}).encode(), 0
        start("200 OK", [("Content-Length", str(len(answer)))])
        return [answer]

    def _due(self, environ: dict[str, Any]) -> str | None:
        with self._lock:
            self._requests += 1
            plan = self._plan
            if plan is None or environ["REQUEST_METHOD"] != plan["method"] or plan["path"] not in environ["PATH_INFO"]:
                return None
            plan["skip"] -= 1
            if plan["skip"] >= 0:
                return None
            plan["times"] -= 1
            return str(plan["how"]) if plan["times"] >= 0 else None


def _refuse(start: Start, how: str) -> list[bytes]:
    status, body = "503 Slow" if how == "503" else "500 Broken", ERROR % CODES[how]
    start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


def _cut(body: bytes) -> Iterator[bytes]:
    yield body[: len(body) // 2]
    raise ConnectionAbortedError("on purpose")


class Quiet(WSGIRequestHandler):
    """HTTP/1.1, so that connections are kept, and no log."""

    protocol_version = "HTTP/1.1"

    def log(self, *_: object) -> None: ...


if __name__ == "__main__":
    server = make_server("127.0.0.1", 0, Faulty(), threaded=True, request_handler=Quiet)
    print(server.server_port, flush=True)
    with open(os.devnull, "w") as sys.stderr:  # a cut answer is a traceback there
        server.serve_forever()
