"""Decoding children of a worker: pictures are decoded and pairs judged in processes that may die.

    decode, judge ──► waiting ──► at most PLACES jobs sent to each child ──► answers, in the order sent

A native decoder that crashes takes its process along, not the shard. The job that was at work is tried once more in
another process (a heap may have been spoilt by the picture before); one that dies again, or that runs out of time, is
given up with its reason. Jobs that were queued behind it go elsewhere as they are. A child always has its next job in
its pipe, so it never waits for the parent's loop.
"""

import asyncio
import hashlib
import json
import logging
from collections import deque
from collections.abc import Iterator
from typing import Any, Self

from cluster.errors import UserError, WorkFailed
from ingest.blocklists import read_block_lists
from ingest.child_process import ChildProcess, Job
from ingest.decode_config import DecodeConfig, FiltersConfig
from ingest.frames import DECODE, JUDGE, LIST, SETTINGS, request
from ingest.outcome import Decoded, Outcome, Status
from ingest.tray import PLACES
from ingest.user_filters import distribution_of

log = logging.getLogger(__name__)

_PAIRS_A_JOB = 256
_CHARACTERS_A_JOB = 500_000
_STARTS = 3
# Wall time beyond CPU time, for machines whose cores are shared: only a job that sleeps ever meets it.
_WALL_OVER_CPU = 4


class _Lost(Exception):
    """The job's child died of it: `how` is crashed or timeout."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how


class Children:
    """`config.decode_processes` children, as an async context manager on the running loop. All calls from that loop."""

    def __init__(self, config: DecodeConfig) -> None:
        self._config = config
        self._waiting: deque[Job] = deque()
        self._children: list[ChildProcess] = []
        self._failed_starts = 0
        self._over: Exception | None = None
        self.replaced = 0

    async def __aenter__(self) -> Self:
        plain = self._config.model_dump(mode="json", include=set(DecodeConfig.model_fields))
        lists = await asyncio.to_thread(_checked_lists, self._config.filters)
        self._settings = request(SETTINGS, json.dumps({"config": plain, "lists": len(lists)}).encode())
        for name, text in lists.items():
            self._settings += request(LIST, text, name)
        try:
            for _ in range(self._config.decode_processes):
                self._children.append(self._started())
            while starting := [child.ready for child in self._children if not child.was_ready]:
                await asyncio.wait(starting)
                if self._over is not None:
                    raise self._over
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._end(WorkFailed("the decoding processes were closed while pictures waited for them"))
        for child in self._children:
            child.end()
        self._children = []

    async def decode(self, body: bytes, url: str, caption: str) -> Decoded:
        """Never raises for what bytes hold; `WorkFailed` where no child can be started any more."""
        try:
            answer, data = await self._answered(Job(DECODE, body, url, caption, _future()))
        except _Lost as lost:
            sha256 = hashlib.sha256(body).hexdigest()
            return Decoded(None, Outcome(Status.UNDECODABLE, f"decoder_{lost.how}", image_sha256=sha256))
        outcome = Outcome(Status(answer.pop("status")), **answer)
        return Decoded(data if outcome.status == Status.OK else None, outcome)

    async def judge(self, pairs: list[tuple[str, str]]) -> list[str | None]:
        """For each (url, caption) why it is filtered, or None."""
        if not self._config.filters.judge_pairs:
            return [None] * len(pairs)
        judged = await asyncio.gather(*(self._judged(part) for part in _parts(pairs)))
        return [reason for part in judged for reason in part]

    async def _judged(self, pairs: list[tuple[str, str]]) -> list[str | None]:
        try:
            answer, _ = await self._answered(Job(JUDGE, json.dumps(pairs).encode(), "", "", _future()), first=True)
        except _Lost as lost:
            if len(pairs) == 1:
                return [f"filter_{lost.how}"]
            alone = await asyncio.gather(*(self._judged([pair]) for pair in pairs))
            return [reason for part in alone for reason in part]
        reasons: list[str | None] = answer["reasons"]
        return reasons

    async def _answered(self, job: Job, *, first: bool = False) -> tuple[dict[str, Any], bytes]:
        if self._over is not None:
            raise self._over
        if first:  # nothing is fetched before it is judged
            self._waiting.appendleft(job)
        else:
            self._waiting.append(job)
        self._feed()
        answer, data = await job.done
        for failure in answer.pop("failures", ()):
            log.warning("%s", failure)
        return answer, data

    def _feed(self) -> None:
        while self._waiting:
            free = [child for child in self._children if child.takes_jobs and len(child.sent) < PLACES]
            if not free:
                return
            job = self._waiting.popleft()
            if not job.done.done():  # else its caller went away
                min(free, key=lambda child: len(child.sent)).send(job)

    def _started(self) -> ChildProcess:
        return ChildProcess(self._settings, _WALL_OVER_CPU * self._config.decode_deadline_s, self._feed, self._on_death)

    def _on_death(self, child: ChildProcess, how: str) -> None:
        """Its jobs go back to the front; the one at work is charged."""
        rest = list(child.sent)
        child.sent.clear()
        if rest and (how == "timeout" or rest[0].crashes > 0):
            lost = rest.pop(0)
            if not lost.done.done():
                lost.done.set_exception(_Lost(how))
        elif rest:
            rest[0].crashes += 1
        self._waiting.extendleft(reversed(rest))
        if self._over is not None or child not in self._children:
            return
        self._failed_starts = 0 if child.was_ready else self._failed_starts + 1
        if self._failed_starts >= _STARTS or isinstance(child.start_error, UserError):
            assert child.start_error is not None
            self._end(child.start_error)
            return
        self.replaced += child.was_ready
        try:
            self._children[self._children.index(child)] = self._started()
        except WorkFailed as error:
            self._end(error)
        self._feed()

    def _end(self, error: Exception) -> None:
        self._over = self._over or error
        jobs = [*self._waiting, *(job for child in self._children for job in child.sent)]
        self._waiting.clear()
        for job in jobs:
            if not job.done.done():
                job.done.set_exception(self._over)
                job.done.exception()  # its caller may have gone away


def _parts(pairs: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Jobs of at most _PAIRS_A_JOB pairs, and of few where captions are vast."""
    part: list[tuple[str, str]] = []
    characters = 0
    for pair in pairs:
        characters += len(pair[0]) + len(pair[1])
        if part and (len(part) == _PAIRS_A_JOB or characters > _CHARACTERS_A_JOB):
            yield part
            part, characters = [], len(pair[0]) + len(pair[1])
        part.append(pair)
    if part:
        yield part


def _checked_lists(filters: FiltersConfig) -> dict[str, bytes]:
    for setting in ("pair_filters", "picture_filters"):
        for path in getattr(filters, setting):
            distribution_of(path, f"images.filters.{setting}")
    return read_block_lists(filters)


def _future() -> "asyncio.Future[tuple[dict[str, Any], bytes]]":
    return asyncio.get_running_loop().create_future()
