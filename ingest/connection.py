"""One connection to one checked address: a request at a time, its answer under caps and a clock.

The clock is one timer a request. It ends the answer at the URL's deadline and, `min_rate_after_s` after the answer's
first byte, where bytes (of head or body) come slower than `min_bytes_per_s`. While reading is paused because we have
no room, the clock stands still.
"""

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import cast

import httptools

from ingest.address import IPAddress
from ingest.answer import KEPT_HEADERS, Answer, FetchFailed, Stale

MAX_HEAD_BYTES = 65_536
_FRAMING_BYTES = 4  # of a header line: colon, space, end of line
# What an unwanted body may cost before its connection is given up rather than kept.
_DISCARDED_BYTES = 65_536
_DISCARDING_S = 0.5
# Times are monotonic(), because uvloop's own clock stands still within a round of the loop; and libuv fires timers
# before it reads: what had come by the deadline is still in the socket when a stall of ours ends.
GRACE_S = 0.02


class Connection(asyncio.Protocol):
    """`on_lost` is called when the connection is gone while no request is on it."""

    def __init__(
        self, min_rate_after_s: float, min_bytes_per_s: float, on_lost: "Callable[[Connection], None] | None" = None
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._min_rate_after_s = min_rate_after_s
        self._min_bytes_per_s = min_bytes_per_s
        self.on_lost = on_lost
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._ended: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.requests = 0
        self.reusable = False
        self.lost = False
        self.deadline_at = 0.0
        self.address: IPAddress | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not its subclasses

    def ask(self, request: bytes, answer: Answer, left_s: float) -> "asyncio.Future[None]":
        """Done when the answer has ended, well or not; `answer.failure` tells. `deadline_at` holds what is left."""
        assert self._answer is None and self._transport is not None
        now = monotonic()
        self._answer = answer
        answer.pause, answer.resume = self._pause, self._resume
        self._ended = self._loop.create_future()
        self.reusable = False
        self.deadline_at = now + left_s
        self._first_byte_at = self._paused_at = 0.0
        self._received = self._head_bytes = self._header_bytes = self._discarded = 0
        self._head_done = self._to_the_end = self._discarding = self._expired = False
        self.requests += 1
        patience_s = self._min_rate_after_s if self._min_bytes_per_s > 0 else left_s
        self._timer = self._loop.call_later(min(left_s, patience_s), self._look)
        if self.lost:
            self._fail(Stale())
        else:
            self._transport.write(request)
            answer.begin()
        return self._ended

    @property
    def first_byte_at(self) -> float:
        """0.0 where none came."""
        return self._first_byte_at

    def give_up(self) -> None:
        """Whoever asked does not want the answer any more."""
        if self._answer is not None:
            self._finish(keep=False)
        self.close()

    def close(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.abort()

    # What arrives.

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:
            self.close()  # nothing was asked
            return
        if not self._received:
            self._first_byte_at = monotonic()
        self._received += len(data)
        if not self._head_done:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if self._answer is answer:
                self._fail(FetchFailed("bad_response", may_pass=False))
            self.close()
            return
        if self._answer is answer and not self._head_done and self._head_bytes > MAX_HEAD_BYTES:
            self._fail(FetchFailed("header_too_large", may_pass=False))

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        answer = self._answer
        if answer is None:
            if self.on_lost is not None:
                self.on_lost(self)
        elif self._discarding:
            self._finish(keep=False)
        elif self._head_done and self._to_the_end and error is None:
            answer.end()
            self._finish(keep=False)
        elif not self._received and self.requests > 1:
            self._fail(Stale())
        else:
            self._fail(FetchFailed("connection_cut", may_pass=True, network=not self._received))

    # The parser's callbacks.

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value) + _FRAMING_BYTES
        name = name.lower()
        if name in KEPT_HEADERS and self._answer is not None and not self._head_done:
            self._answer.headers.append((name, value))

    def on_headers_complete(self) -> None:
        answer, status = self._answer, self._parser.get_status_code()
        if answer is None:
            self.close()
        elif self._header_bytes > MAX_HEAD_BYTES:
            self._fail(FetchFailed("header_too_large", may_pass=False))
        elif status == 101:
            self._fail(FetchFailed("bad_response", may_pass=False))
        elif status < 200:
            answer.headers.clear()
        else:
            self._head_done = True
            self._to_the_end = not any(name in (b"content-length", b"transfer-encoding") for name, _ in answer.headers)
            if not answer.head(status):
                self._discarding = True
                self._look_at(monotonic() + _DISCARDING_S)

    def on_body(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:
            return
        if self._discarding:
            self._discarded += len(data)
            if self._discarded > _DISCARDED_BYTES:
                self._finish(keep=False)
        elif not answer.data(data):
            answer.end()
            self._finish(keep=False)

    def on_message_complete(self) -> None:
        answer = self._answer
        if answer is None or not self._head_done:
            return  # of an interim answer
        if not self._discarding:
            answer.end()
        self._finish(keep=self._parser.should_keep_alive())

    # The clock.

    def _look_at(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(max(0.0, at - monotonic()), self._look)

    def _look(self) -> None:
        """Has the answer's time come? If not, when to look again."""
        now = monotonic()
        if self._paused_at:
            self._look_at(now + self._min_rate_after_s)
            return
        if self._discarding:
            self._finish(keep=False)
            return
        at, failure = self.deadline_at, FetchFailed("deadline", may_pass=False, network=not self._received)
        if self._first_byte_at and self._min_bytes_per_s > 0:
            needed = max(self._min_rate_after_s, self._received / self._min_bytes_per_s)
            if self._first_byte_at + needed < at:
                at, failure = self._first_byte_at + needed, FetchFailed("too_slow", may_pass=False)
        if now < at:
            self._expired = False
            self._look_at(at)
        elif not self._expired:
            self._expired = True
            self._look_at(now + GRACE_S)
        else:
            self._fail(failure)

    def _pause(self) -> None:
        if self._transport is not None and not self._transport.is_closing() and self._answer is not None:
            self._paused_at = monotonic()
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._paused_at and self._transport is not None and not self._transport.is_closing():
            stood_still_s = monotonic() - self._paused_at
            self._paused_at = 0.0
            self.deadline_at += stood_still_s
            self._first_byte_at += stood_still_s
            self._transport.resume_reading()

    # The end.

    def _fail(self, failure: Exception) -> None:
        if self._answer is not None and self._answer.failure is None:
            self._answer.failure = failure
        self._finish(keep=False)

    def _finish(self, *, keep: bool) -> None:
        ended = self._ended
        self._answer = self._ended = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.reusable = keep and not self.lost and not self._paused_at
        if not self.reusable:
            self.close()
        if ended is not None and not ended.done():
            ended.set_result(None)
