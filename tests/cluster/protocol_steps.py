"""A driver's life in one process, stopped at a chosen step.

    python -m tests.cluster.protocol_steps URI kill|full STRIDE SHARDS

The life: some shards, one of which is held and made again; then a revision that changes three and inherits the others;
then `gc`. It may be begun over what any earlier one left. A step is one call that changes the disk, or one
request that changes the store. For every n a
child is forked that is stopped at step n (killed, or told ENOSPC from then on); another goes on, to the end.
With a stride only every so many steps are gone through. Prints {"steps": …, "stopped": …, "faults": […]} as JSON.
"""

import errno
import itertools
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from s3fs import S3FileSystem

from cluster.artifact import Artifact, Request, read_manifest
from cluster.canonical import sha256_bytes
from cluster.check import find_faults
from cluster.environment import environment, environment_digest
from cluster.errors import WorkFailed
from cluster.garbage import collect, delete
from cluster.shards import ShardEntry, ShardTable
from cluster.storage import Folder
from cluster.workshop import Workshop, begin

HELD, CHANGED = 1, (0, 2)
REQUEST = Request("images", 1, {"size": 64}, {"pairs": "ab"})
FULL_EXIT = 3
REAL_FSYNC = os.fsync


def live(folder: Folder, shards: int) -> None:
    manifest = read_manifest(folder)
    if manifest is None:
        workshop = begin(folder, REQUEST, environment())
        workshop.recover()
        for shard in sorted(set(range(shards)) - workshop.committed()):
            commit(workshop, shard, "held" if shard == HELD and not was_discarded(folder) else "first")
        receipt = workshop.receipt(HELD)
        if receipt is not None and "held" in receipt.counts:
            workshop.discard(HELD)
            commit(workshop, HELD, "first")
        manifest = workshop.publish(shards).manifest
    if manifest.revision == 1:
        workshop = begin(folder, REQUEST, environment(), amends={"retry": ["fetch_failed"]})
        workshop.recover()
        for shard in sorted(set(CHANGED) - workshop.committed()):
            commit(workshop, shard, "second")
        published = Artifact(folder, manifest)
        workshop.publish(shards, inherit={e.shard: e for e in published.shards if e.shard not in CHANGED})
    delete(folder, collect(folder))


def commit(workshop: Workshop, shard: int, word: str) -> None:
    with workshop.attempt(shard) as attempt:
        for suffix in ("tar", "txt"):
            attempt.path(f"{shard:08d}.{suffix}").write_bytes(f"{suffix} of {word} shard {shard}\n".encode() * 20)
        attempt.commit(rows=shard, counts={word: shard}, made_from=f"pairs {shard}")


def was_discarded(folder: Folder) -> bool:
    return any(name.endswith(".discarded") for name in (folder / "receipts").names())


class Steps:
    """Counts the calls that change a disk; at the chosen one this process is killed, or the disk full from then on."""

    def __init__(self, stop_at: int | None, how: str) -> None:
        self._stop_at, self._how = stop_at, how
        self._lock = threading.Lock()
        self._count = 0

    def of_disk(self) -> None:
        for name in ("mkdir", "rename", "replace", "link", "unlink", "rmdir", "fsync"):
            setattr(os, name, self._counted(getattr(os, name), frees=name in ("unlink", "rmdir")))
        write_bytes = Path.write_bytes

        def in_two_halves(path: Path, data: bytes) -> int:
            self._step()
            write_bytes(path, data[: len(data) // 2])
            self._step()
            return write_bytes(path, data)

        Path.write_bytes = in_two_halves  # type: ignore[method-assign, assignment]

    def of_store(self) -> None:
        call = S3FileSystem._call_s3

        async def counted(store: S3FileSystem, method: str, *args: Any, **kwargs: Any) -> Any:
            if method.startswith(("put_", "copy_", "delete_")):
                self._step()
            return await call(store, method, *args, **kwargs)

        S3FileSystem._call_s3 = counted

    def _counted(self, call: Callable[..., Any], *, frees: bool) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._step(frees=frees)
            # A killed process takes nothing from the kernel's cache: what fsync is for, a test cannot show.
            return None if call is REAL_FSYNC else call(*args, **kwargs)

        return counted

    def _step(self, *, frees: bool = False) -> None:
        with self._lock:
            here, self._count = self._count, self._count + 1
        if self._stop_at is None or here < self._stop_at:
            return
        if self._how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if not frees:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_a_child(work: Callable[[], int]) -> int:
    """The child's exit status; negative for a signal. Forked: a fresh interpreter for each step would cost minutes."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def lived(folder: Folder, shards: int, stop_at: int | None, how: str) -> int:
    """Exit code of a life: 0 at its end, FULL_EXIT where it ended with words about a full disk."""
    steps = Steps(stop_at, how)
    steps.of_disk() if folder.local else steps.of_store()
    try:
        live(folder, shards)
    except WorkFailed as error:
        return FULL_EXIT if "no space left" in str(error) and "Free some" in str(error) else 4
    return 0


def gone_on(folder: Folder, shards: int, found: Path) -> int:
    """0 where what is published in the middle of things is whole, and the life comes to its end. Lists what is there.

    Names of all files, with the sha256 of all but receipts, which tell of hosts and times.
    """
    if read_manifest(folder) is not None and any(find_faults(Artifact.open(folder))):
        return 5
    live(folder, shards)
    tree = {name: sha256_bytes(folder.read(name)) for name in folder.files_below() if "receipts/" not in name}
    names = [name for name in folder.files_below() if "receipts/" in name]
    found.write_text(json.dumps(tree | dict.fromkeys(names)))
    return 0


# For the environment of this process: it forks, and must have no threads then, numpy's neither.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def main(uri: str, how: str, stride: int, shards: int) -> dict[str, Any]:
    # What every child would load or ask for, once; without threads, which a fork loses (jemalloc's knows what to do).
    environment_digest()
    list(ShardTable.from_entries(iter([[ShardEntry(0, (), "", 0, {})]])))
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    assert len([name for name in names if name != "jemalloc_bg_thd"]) == 1, names
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch) / "found.json"
        assert in_a_child(lambda: gone_on(Folder(f"{uri}/whole"), shards, found)) == 0
        whole, faults, stopped = json.loads(found.read_text()), [], 0
        expected = -signal.SIGKILL if how == "kill" else FULL_EXIT
        for step in itertools.count(0, stride):
            folder = Folder(f"{uri}/{step}")
            code = in_a_child(lambda: lived(folder, shards, step, how))  # noqa: B023 - called at once
            stopped += code == expected
            if code not in (0, expected):
                faults.append(f"step {step}: exit code {code}")
            if in_a_child(lambda: gone_on(folder, shards, found)) != 0:  # noqa: B023
                faults.append(f"step {step}: what is published is not whole, or cannot be gone on with")
            now = json.loads(found.read_text())
            if now != whole:
                differing = sorted(name for name in whole.keys() | now.keys() if whole.get(name, 0) != now.get(name, 0))
                faults.append(f"step {step}: {differing[:4]}")
            if code == 0:
                return {"steps": step, "stopped": stopped, "faults": faults}
            if folder.local:
                folder.delete()
    raise AssertionError("unreachable")


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
