"""A worker for tests of kills: makes small shards that depend on their number alone, and leaves a trace of itself."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from cluster.artifact import Artifact, Request
from cluster.environment import environment
from cluster.lease import Lease
from cluster.session import Session
from cluster.storage import Folder
from cluster.workshop import Workshop, begin

REQUEST = Request("images", 1, {"size": 64}, {"pairs": "ab"})
HERE = __name__
# As children of ingest do: it ends when the pipe to its parent closes, however the parent died.
CHILD = "import sys; sys.stdin.read()"


def text_of(shard: int) -> str:
    return f"shard {shard} " * 50


def commit(workshop: Workshop, shard: int) -> None:
    with workshop.attempt(shard) as attempt:
        for suffix in ("tar", "txt"):
            attempt.path(f"{shard:08d}.{suffix}").write_text(f"{suffix} of {text_of(shard)}")
        attempt.commit(rows=shard, counts={"ok": shard}, made_from=f"pairs {shard}", stats={"seconds": time.time()})


class ShardWorker:
    """kwargs: `traces`, a folder for the process numbers of worker and child; `takes_s` a shard."""

    def __init__(self, traces: str, takes_s: float) -> None:
        self._traces, self._takes_s = Path(traces), takes_s

    def setup(self, ask: Any = None) -> None:
        child = subprocess.Popen([sys.executable, "-S", "-c", CHILD], stdin=subprocess.PIPE)
        threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
        (self._traces / f"worker-{os.getpid()}").write_text(f"{os.getpid()} {child.pid}")

    def process(self, task: dict[str, Any]) -> dict[str, Any]:
        time.sleep(self._takes_s)
        commit(Workshop.from_plain(task["out"]), task["shard"])
        (self._traces / f"shard-{task['shard']}-{os.getpid()}").touch()
        return {"shard": task["shard"]}


def build(session: Session, folder: Path, traces: Path, shards: int, takes_s: float) -> Artifact:
    """What a driver does: take the lease, map what has no receipt, publish."""
    with Lease(Folder(folder)) as lease:
        workshop = begin(Folder(folder / "images"), REQUEST, environment())
        workshop.recover()
        tasks = [
            {"shard": shard, "out": workshop.plain()} for shard in range(shards) if shard not in workshop.committed()
        ]
        session.map_shards(
            f"{HERE}:ShardWorker",
            {"traces": str(traces), "takes_s": takes_s},
            tasks,
            in_flight=2,
            shared=(f"{HERE}:Tally", {}),
        )
        return workshop.publish(shards, fence=lease.check)


class Tally:
    """The smallest shared instance."""

    def report(self) -> dict[str, Any]:
        return {}


def undisturbed(folder: Path, shards: int) -> dict[str, bytes]:
    """The content of the artifact, made by one process in one go."""
    workshop = begin(Folder(folder), REQUEST, environment())
    for shard in range(shards):
        commit(workshop, shard)
    workshop.publish(shards)
    return content(folder)


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of everything but receipts, which tell of hosts and times, and requests of other runs."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "receipts"
    }
