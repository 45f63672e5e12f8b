"""How fast new connections to one host are opened.

A small server has room for a handful of connections that it has not accepted yet. What comes on top is dropped by its
kernel, and ours tries again after 1, 3, 7 seconds: a burst of 256 connections loses rows to their deadline on a
server that would have served every one of them in time. So a few connections at a time are opened without having
answered yet, and beyond those one every few milliseconds, which still opens hundreds a second where latency is high.
"""

import asyncio
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import aiohttp

_UNANSWERED = 4
_PACE_S = 0.005


class _Host:
    def __init__(self) -> None:
        self.unanswered = asyncio.Semaphore(_UNANSWERED)
        self.turn = asyncio.Lock()


class Opening:
    """A request on its way: passed as `trace_request_ctx`, and told when the answer's head, or an error, is there."""

    def __init__(self, host: _Host) -> None:
        self._host = host
        self._holds = False

    async def begin(self) -> None:
        # One after another, so that a stall of our event loop is not followed by the burst that it held back.
        async with self._host.turn:
            try:
                async with asyncio.timeout(_PACE_S):
                    await self._host.unanswered.acquire()
                    self._holds = True
            except TimeoutError:
                pass

    def answered(self) -> None:
        if self._holds:
            self._holds = False
            self._host.unanswered.release()


class ConnectionPacer:
    """One for a client session: `tracing` goes to the session, `opening` to each of its requests."""

    def __init__(self) -> None:
        self._hosts: defaultdict[tuple[str, int], _Host] = defaultdict(_Host)
        self.tracing = aiohttp.TraceConfig()
        # aiohttp awaits this before it connects, and does not send it where it reuses a connection.
        self.tracing.on_connection_create_start.append(self._before_connecting)

    def opening(self, host: str, port: int) -> Opening:
        return Opening(self._hosts[host, port])

    @staticmethod
    async def _before_connecting(_session: aiohttp.ClientSession, context: SimpleNamespace, _parameters: Any) -> None:
        await context.trace_request_ctx.begin()
