"""One decoding process, seen from its parent: its pipes, its clock, and the jobs that it has.

Both pipes are read and written by the loop and never block it; bodies and pictures lie in the tray where they fit. How
the process ended is told once, by `on_death`; whether that was its own doing (a crash, the kernel's limits) or ours
(its time was up) makes the word.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import UserError, WorkFailed
from ingest.frames import DECODE, HEAD_BYTES, IN_FRAME, answer_head, request
from ingest.tray import PLACES, Tray, tray_memory

_PIPE_BYTES = 1 << 20
_READ_BYTES = 1 << 17  # more would be set aside anew for each read, and given back
_START_S = 60.0
_COMPLAINT_BYTES = 2000
_F_SETPIPE_SZ = 1031
# The folder of our packages comes last on the child's path: in front of it, a stray module would hide Python's own.
_ROOT = str(Path(__file__).resolve().parent.parent)
_BEGIN = "import sys; sys.path.append(sys.argv.pop(1)); from ingest.child import main; main()"


@dataclass
class Job:
    """A request, and where its answer goes: JSON and data."""

    kind: bytes
    body: bytes
    url: str
    caption: str
    done: "asyncio.Future[tuple[dict[str, Any], bytes]]"
    crashes: int = 0


class ChildProcess:
    """One process, and the jobs that it was sent and has not answered, oldest first."""

    def __init__(
        self,
        settings: list[bytes],
        deadline_s: float,
        on_room: Callable[[], None],
        on_death: Callable[["ChildProcess", str], None],
    ) -> None:
        self.sent: deque[Job] = deque()
        self.was_ready = False
        self.start_error: UserError | WorkFailed | None = None
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.ready.add_done_callback(lambda ready: ready.exception())  # of a replacement, nobody waits
        self._deadline_s, self._on_room, self._on_death = deadline_s, on_room, on_death
        self._overdue = self._dead = self._writing = False
        self._received = bytearray()
        self._number = 0  # of the next job
        self._said = ""
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115
        memory = tray_memory()
        self._tray = Tray(memory)
        try:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", "-c", _BEGIN, _ROOT, str(os.getpid()), str(memory)],
                pass_fds=(memory,),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                env=_environment(),
                bufsize=0,
            )
        except OSError as error:
            self._complaints.close()
            self._tray.close()
            raise WorkFailed(f"a decoding process cannot be started with {sys.executable}: {error}") from error
        finally:
            os.close(memory)
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

    def send(self, job: Job) -> None:
        if not self.sent:
            self._busy_since = self._loop.time()
        self.sent.append(job)
        # The job that had this place before has been answered: a child has no more jobs at a time than places.
        place, self._number = self._number % PLACES, self._number + 1
        if job.kind == DECODE and self._tray.holds(job.body):
            self._tray.put(place, job.body)
        else:
            place = IN_FRAME
        self._outgoing.extend(map(memoryview, request(job.kind, job.body, job.url, job.caption, place)))
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
        self._tray.close()
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
            text_bytes, data_bytes, place = answer_head(self._received)
            end = HEAD_BYTES + text_bytes + (data_bytes if place == IN_FRAME else 0)
            if len(self._received) < end:
                return
            text = self._received[HEAD_BYTES : HEAD_BYTES + text_bytes].decode()  # json guesses at bytes
            if place == IN_FRAME:
                picture = bytes(memoryview(self._received)[HEAD_BYTES + text_bytes : end])
            else:
                picture = self._tray.take(place, data_bytes)
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


def _environment() -> dict[str, str]:
    """The children's. A child is one thread; what it allocates for one big picture goes back at once."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(8 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(32 << 20),
    }
