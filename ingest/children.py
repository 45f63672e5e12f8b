"""Decoding children of a worker: pictures are decoded and pairs judged in processes that may die.

    decode, judge ──► waiting ──► at most _DEPTH jobs sent to each child ──► answers, in the order sent

A native decoder that crashes takes its process along, not the shard. The job that was at work is tried once more in
another process (a heap may have been spoilt by the picture before); one that dies again, or that runs out of time, is
given up with its reason. Jobs that were queued behind it go elsewhere as they are. A child always has its next job in
its pipe, so it never waits for the parent's loop.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from cluster.errors import UserError, WorkFailed
from ingest.blocklists import read_block_lists
from ingest.decode_config import DecodeConfig, FiltersConfig
from ingest.frames import DECODE, HEAD_BYTES, JUDGE, LIST, SETTINGS, answer_lengths, request
from ingest.outcome import Decoded, Outcome, Status
from ingest.user_filters import distribution_of

log = logging.getLogger(__name__)

_DEPTH = 3
_PIPE_BYTES = 1 << 20
_READ_BYTES = 1 << 17  # more would be set aside anew for each read, and given back
_PAIRS_A_JOB = 256
_CHARACTERS_A_JOB = 500_000
_START_S = 60.0
_STARTS = 3
_COMPLAINT_BYTES = 2000
_F_SETPIPE_SZ = 1031
# Wall time beyond CPU time, for machines whose cores are shared: only a job that sleeps ever meets it.
_WALL_OVER_CPU = 4
# The folder of our packages comes last on the child's path: in front of it, a stray module would hide Python's own.
_ROOT = str(Path(__file__).resolve().parent.parent)
_BEGIN = "import sys; sys.path.append(sys.argv.pop(1)); from ingest.child import main; main()"


class _Lost(Exception):
    """The job's child died of it: `how` is crashed or timeout."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how


@dataclass
class _Job:
    pieces: list[bytes]
    done: "asyncio.Future[tuple[dict[str, Any], bytes]]"
    crashes: int = field(default=0)


class Children:
    """`config.decode_processes` children, as an async context manager on the running loop. All calls from that loop."""

    def __init__(self, config: DecodeConfig) -> None:
        self._config = config
        self._waiting: deque[_Job] = deque()
        self._children: list[_Child] = []
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
            await asyncio.gather(*(child.ready for child in self._children))
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
            answer, data = await self._answered(_Job(request(DECODE, body, url, caption), _future()))
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
            answer, _ = await self._answered(_Job(request(JUDGE, json.dumps(pairs).encode()), _future()), first=True)
        except _Lost as lost:
            if len(pairs) == 1:
                return [f"filter_{lost.how}"]
            alone = await asyncio.gather(*(self._judged([pair]) for pair in pairs))
            return [reason for part in alone for reason in part]
        reasons: list[str | None] = answer["reasons"]
        return reasons

    async def _answered(self, job: _Job, *, first: bool = False) -> tuple[dict[str, Any], bytes]:
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
            free = [child for child in self._children if child.takes_jobs and len(child.sent) < _DEPTH]
            if not free:
                return
            job = self._waiting.popleft()
            if not job.done.done():  # else its caller went away
                min(free, key=lambda child: len(child.sent)).send(job)

    def _started(self) -> "_Child":
        return _Child(self._settings, _WALL_OVER_CPU * self._config.decode_deadline_s, self._feed, self._on_death)

    def _on_death(self, child: "_Child", how: str) -> None:
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


class _Child:
    """One process, and the jobs that it was sent and has not answered, oldest first."""

    def __init__(
        self,
        settings: list[bytes],
        deadline_s: float,
        on_room: Callable[[], None],
        on_death: Callable[["_Child", str], None],
    ) -> None:
        self.sent: deque[_Job] = deque()
        self.was_ready = False
        self.start_error: UserError | WorkFailed | None = None
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.ready.add_done_callback(lambda ready: ready.exception())  # of a replacement, nobody waits
        self._deadline_s, self._on_room, self._on_death = deadline_s, on_room, on_death
        self._overdue = self._dead = self._writing = False
        self._received = bytearray()
        self._said = ""
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", "-c", _BEGIN, _ROOT, str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                env=_environment(),
                bufsize=0,
            )
        except OSError as error:
            self._complaints.close()
            raise WorkFailed(f"a decoding process cannot be started with {sys.executable}: {error}") from error
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        for descriptor in (self._to, self._from):
            os.set_blocking(descriptor, False)
            with contextlib.suppress(OSError):  # the system allows less: the child waits for the loop now and then
                fcntl.fcntl(descriptor, _F_SETPIPE_SZ, _PIPE_BYTES)
        self._outgoing: list[memoryview] = [memoryview(piece) for piece in settings]
        self._busy_since = self._loop.time()
        self._clock = self._loop.call_later(_START_S, self._check_clock)
        self._loop.add_reader(self._from, self._read)
        self._write()

    @property
    def takes_jobs(self) -> bool:
        return self.was_ready and not self._dead

    def send(self, job: _Job) -> None:
        if not self.sent:
            self._busy_since = self._loop.time()
        self.sent.append(job)
        self._outgoing.extend(memoryview(piece) for piece in job.pieces)
        if not self._writing:
            self._write()

    def end(self) -> None:
        """Ends the process, at once; a second call does nothing."""
        if self._dead:
            return
        self._dead = True
        self._clock.cancel()
        self._loop.remove_reader(self._from)
        self._loop.remove_writer(self._to)
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._end_complaints()

    def _end_complaints(self) -> None:
        """What it writes to stderr is kept until it is ready: why it could not start."""
        if not self._complaints.closed:
            self._complaints.seek(0, os.SEEK_END)
            self._complaints.seek(max(0, self._complaints.tell() - _COMPLAINT_BYTES))
            self._said = self._complaints.read().decode(errors="replace").strip()
            self._complaints.close()

    def _write(self) -> None:
        try:
            while self._outgoing:
                written = os.writev(self._to, self._outgoing)
                while self._outgoing and written >= len(self._outgoing[0]):
                    written -= len(self._outgoing.pop(0))
                if written:
                    self._outgoing[0] = self._outgoing[0][written:]
        except BlockingIOError:
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self._to, self._write)
            return
        except BrokenPipeError:
            self._outgoing.clear()  # it is dead; the end of its answers tells so
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._to)

    def _read(self) -> None:
        try:
            data = os.read(self._from, _READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._died()
            return
        self._received += data
        while len(self._received) >= HEAD_BYTES:
            text_bytes, data_bytes = answer_lengths(self._received)
            end = HEAD_BYTES + text_bytes + data_bytes
            if len(self._received) < end:
                return
            text = self._received[HEAD_BYTES : HEAD_BYTES + text_bytes].decode()  # json guesses at bytes
            picture = bytes(memoryview(self._received)[HEAD_BYTES + text_bytes : end])
            del self._received[:end]
            self._take(json.loads(text), picture)

    def _take(self, answer: dict[str, Any], data: bytes) -> None:
        self._busy_since = self._loop.time()
        if not self.was_ready:
            if "wrong" in answer:
                self.start_error = UserError(answer["wrong"])
                return
            self.was_ready = True
            self._end_complaints()
            self._clock.cancel()
            self._clock = self._loop.call_later(self._deadline_s, self._check_clock)
            self.ready.set_result(None)
        else:
            job = self.sent.popleft()
            if not job.done.done():
                job.done.set_result((answer, data))
        self._on_room()

    def _check_clock(self) -> None:
        self._read()  # what stands in the pipe came in time, however late the loop looks
        if self._dead:
            return
        now = self._loop.time()
        if not self.was_ready or (self.sent and now - self._busy_since >= self._deadline_s):
            self._overdue = True
            self._died()
            return
        since = self._busy_since if self.sent else now
        self._clock = self._loop.call_later(max(0.05, since + self._deadline_s - now), self._check_clock)

    def _died(self) -> None:
        self.end()
        code = self._process.returncode
        if not self.was_ready and self.start_error is None:
            why = f"did not start within {_START_S:.0f} s" if self._overdue else f"ended with code {code} at its start"
            self.start_error = WorkFailed(f"a decoding process {why}; it said: {self._said or 'nothing'}")
        if self.start_error is not None and not self.ready.done():
            self.ready.set_exception(self.start_error)
        timeout = self._overdue or code == -signal.SIGPROF
        self._on_death(self, "timeout" if timeout else "crashed")


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


def _environment() -> dict[str, str]:
    """The children's. A child is one thread; what it allocates for one big picture goes back at once."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(8 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(32 << 20),
    }
