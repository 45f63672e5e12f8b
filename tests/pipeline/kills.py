"""Kills over image runs, and the proof that they cost nothing: `python -m tests.pipeline.kills --page docs/kills.md`.

A run up to `images`, over a web of scenes that outlives every victim, is killed at random moments and driven again
until it is done; its content is compared, byte by byte, with that of an undisturbed run. Victims:

    actor     a process that works on shards; the run goes on without being called again
    child     a decoding process of an actor; the same
    shared    the process that all actors ask about hosts; the same
    node      a node of a Ray of two, with all its processes; it joins again seconds later
    driver    `unclip run` itself; its orphans may still be at work when it is called again, at once
    session   every process of the run at once
"""

import argparse
import io
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import psutil
import pyarrow.parquet as pq

from ingest.scene_server import SceneServer, write_scene_tables
from ingest.source_config import ScenesConfig
from tests.pipeline.kills_page import Kill, Record, page, print_summary
from tests.pipeline.processes import kill_all, named, session_of

UNCLIP = str(Path(sys.executable).parent / "unclip")
ROWS, SHARD_ROWS, SHARDS = 600, 24, 26  # a few rows that stand twice or are wanting come on top
IN_PLACE = {"actor": "ray::_ShardActor", "child": "ingest.child", "shared": "ray::_SharedActor"}
VICTIMS = (*IN_PLACE, "node", "driver", "session")
SHARES = {"actor": 0.25, "child": 0.2, "shared": 0.1, "node": 0.1, "driver": 0.175, "session": 0.175}
RUN_TIMEOUT_S, MOST_CALLS = 300.0, 3
RAY_ENVIRONMENT = {
    **os.environ,
    "RAY_AUTH_MODE": "disabled",  # head, node and driver are strangers to each other, on one machine
    # A node that is gone is noticed after a second and a half, not after half a minute.
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}


def receipts_of(run: Path) -> int:
    try:
        return sum(name.endswith(".json") for name in os.listdir(run / "images" / "receipts"))
    except FileNotFoundError:
        return 0


def state_of(run: Path) -> str:
    """How far the images stage is, as the run's folder tells."""
    images = run / "images"
    if (images / "manifest.json").exists():
        return "published"
    receipts = receipts_of(run)
    if receipts == SHARDS:
        return "all shards done, not published"
    if receipts:
        return "some shards done"
    return "no shard done" if images.exists() else "before the stage"


def content(run: Path) -> dict[str, bytes]:
    """The bytes of all that is content: not receipts, which record hosts, times and attempts, and no scratch."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for name in ("pairs", "images")
        for path in sorted((run / name).rglob("*"))
        if path.is_file() and path.parent.name != "receipts" and ".staging" not in path.parts
    }


def ended_differently(name: str, whole: bytes, killed: bytes) -> list[str]:
    """Rows of a ledger that ended in another way than in the undisturbed run."""
    ends = []
    for data in (whole, killed):
        rows = pq.read_table(io.BytesIO(data)).to_pylist()
        ends.append([(row["key"], row["status"], row["reason"]) for row in rows if "status" in row])
    pairs = itertools.zip_longest(*ends)
    return [f"{name}: {one} in the undisturbed run, {other} here" for one, other in pairs if one != other]


class Runs:
    """Runs in one folder, one after another, each disturbed until it is done and then compared with `whole`."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._rng = random.Random(seed)
        # What drips takes a second: a run that lasts can be hit.
        scenes = ScenesConfig(count=ROWS, port=free_port(), picture_size=64, misbehaving_share=0.03)
        self._table = write_scene_tables(folder / "source", scenes)["training"]
        self._allowed = f"127.0.0.1/32:{scenes.port}"
        self._web = SceneServer(scenes)
        self.record = Record(seed, SHARDS)

    def __enter__(self) -> Self:
        """The undisturbed run."""
        folder = self._folder
        self._web.__enter__()
        self._finish(folder / "whole", self._start(folder / "whole"))
        self._whole = content(folder / "whole")
        manifest = json.loads((folder / "whole" / "images" / "manifest.json").read_bytes())
        assert manifest["totals"]["shards"] == SHARDS, manifest["totals"]
        self.record.rows = manifest["totals"]["rows"]
        return self

    def __exit__(self, *error: Any) -> None:
        self._web.__exit__(*error)

    def kill_in_place(self, victims: list[str]) -> None:
        """Processes whose death a run survives: as many a run as it lives through, several seconds apart."""
        waiting = list(victims)
        while waiting:
            run = self._next_run()
            process = self._start(run)
            while waiting and process.poll() is None:
                if self._ends_before(process, run, self._moment(run, ahead=8)):
                    break
                # Whom it may hit is there only once the actors are.
                candidates = named(process.pid, IN_PLACE[waiting[0]])
                if not candidates:
                    continue
                state = state_of(run)
                if state != "published" and kill_all([self._rng.choice(candidates)]):
                    self.record.kills.append(Kill(waiting.pop(0), state, self.record.runs))
            self._finish(run, process)
            self._compare(run)

    def kill_and_call_again(self, victims: list[str]) -> None:
        """Drivers and sessions: the run ends with them and is called again in the same folder, until it is done."""
        waiting = list(victims)
        while waiting:
            run = self._next_run()
            while waiting:
                process = self._start(run)
                if self._ends_before(process, run, self._moment(run, ahead=SHARDS)):
                    break
                state = state_of(run)
                if waiting[0] == "session":
                    kill_session(process.pid)
                else:
                    process.kill()
                process.wait()
                if process.returncode == -signal.SIGKILL:
                    self.record.kills.append(Kill(waiting.pop(0), state, self.record.runs))
                if receipts_of(run) == SHARDS:  # the next kill would find it as this one did
                    break
            self._finish(run, self._start(run))
            self._compare(run)

    def kill_nodes(self, count: int) -> None:
        if not count:
            return
        with ray_head() as address:
            left = count
            second = start_node(address)
            while left:
                run = self._next_run()
                there = ("--set", f"cluster.address={address}")
                process = self._start(run, *there)
                while left and process.poll() is None:
                    if self._ends_before(process, run, self._moment(run, ahead=8)):
                        break
                    if not named(second.pid, IN_PLACE["actor"]):
                        continue
                    state = state_of(run)
                    kill_session(second.pid)
                    second.wait()
                    if state != "published":
                        self.record.kills.append(Kill("node", state, self.record.runs))
                        left -= 1
                    second = start_node(address)
                self._finish(run, process, *there)
                self._compare(run)
            kill_session(second.pid)
            second.wait()

    def _next_run(self) -> Path:
        self.record.runs += 1
        return self._folder / f"killed-{self.record.runs}"

    def _start(self, run: Path, *more: str) -> "subprocess.Popen[bytes]":
        self.record.calls += 1
        settings = {
            "source.scenes": "null",
            "source.pairs": self._table,
            "evaluation_sets": "[]",
            "images.shard_rows": SHARD_ROWS,
            "images.allow_networks": f'["{self._allowed}"]',
            "images.shards_in_flight": 2,
            "cluster.shard_attempts": 50,  # who is killed at random may be killed again and again
        }
        command = [UNCLIP, "run", "tiny", "--out", str(run), "--until", "images"]
        command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        with (self._folder / f"{run.name}.log").open("ab") as log:
            return subprocess.Popen(
                [*command, *more],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=RAY_ENVIRONMENT,
            )

    def _moment(self, run: Path, *, ahead: int) -> tuple[int, float]:
        """When to strike: so many shards done, and seconds after that. -1: while Ray and its processes start."""
        done, luck = receipts_of(run), self._rng.random()
        if not done and luck < 0.5:
            return -1, self._rng.uniform(0.0, 6.0)
        if luck > 0.85:  # between the last receipt and the manifest
            return SHARDS, self._rng.uniform(0.0, 0.02)
        return self._rng.randint(done, min(SHARDS, done + ahead)), self._rng.uniform(0.0, 0.3)

    def _ends_before(self, process: "subprocess.Popen[bytes]", run: Path, moment: tuple[int, float]) -> bool:
        shards, later_s = moment
        while process.poll() is None and receipts_of(run) < shards:
            time.sleep(0.005)
        deadline = time.monotonic() + later_s
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return process.poll() is not None

    def _finish(self, run: Path, process: "subprocess.Popen[bytes]", *more: str) -> None:
        """Let the run come to its end. One that gives up after a kill is called again, and counted."""
        for again in range(MOST_CALLS):
            try:
                code = process.wait(RUN_TIMEOUT_S)
            finally:
                kill_session(process.pid)
            if code == 0:
                self.record.gave_up += again
                return
            process = self._start(run, *more)
        kill_session(process.pid)
        said = (self._folder / f"{run.name}.log").read_text(errors="replace")[-3000:]
        raise AssertionError(f"{run.name} does not come to its end; the last exit code is {code}:\n{said}")

    def _compare(self, run: Path) -> None:
        whole, killed = self._whole, content(run)
        names = sorted(whole.keys() | killed.keys())
        differing = [name for name in names if whole.get(name) != killed.get(name)]
        self.record.differing += [f"{run.name}/{name}" for name in differing]
        for name in differing:
            if name.endswith(".parquet") and name in whole and name in killed:
                self.record.rows_differing += ended_differently(f"{run.name}/{name}", whole[name], killed[name])
        self.record.files += len(names)
        self.record.bytes += sum(len(data) for data in killed.values())
        print(f"{run.name}: {len(self.record.kills)} kills so far, {len(differing)} files differ", file=sys.stderr)


def disturb(folder: Path, kills: int, seed: int) -> Record:
    """`kills` kills, by victim in the shares of `SHARES`, each victim at least once."""
    started = time.monotonic()
    counts = {victim: max(1, round(kills * SHARES[victim])) for victim in VICTIMS}
    counts["actor"] += kills - sum(counts.values())
    rng = random.Random(seed + 1)
    in_place = [victim for victim in IN_PLACE for _ in range(counts[victim])]
    ending = [victim for victim in ("driver", "session") for _ in range(counts[victim])]
    rng.shuffle(in_place)
    rng.shuffle(ending)
    with Runs(folder, seed) as runs:
        runs.kill_in_place(in_place)
        runs.kill_and_call_again(ending)
        runs.kill_nodes(counts["node"])
    runs.record.seconds = time.monotonic() - started
    return runs.record


def kill_session(leader: int) -> None:
    while kill_all(session_of(leader)):
        time.sleep(0.05)


@contextmanager
def ray_head() -> Iterator[str]:
    """A Ray of one node, and its address; another joins by `start_node`."""
    port = free_port()
    head = _ray("--head", "--port", str(port), "--include-dashboard=false")
    try:
        wait_for(port)
        yield f"127.0.0.1:{port}"
    finally:
        kill_session(head.pid)
        head.wait()


def start_node(address: str) -> "subprocess.Popen[bytes]":
    return _ray("--address", address)


def _ray(*arguments: str) -> "subprocess.Popen[bytes]":
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus", "1", *arguments]
    return subprocess.Popen(
        [*command, "--object-store-memory", str(100 << 20), "--disable-usage-stats"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=RAY_ENVIRONMENT,
    )


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError(f"Ray's head does not answer on port {port}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.pipeline.kills", description="Kills over image runs.")
    parser.add_argument("--kills", type=int, default=100, help="how many, all victims together  [100]")
    parser.add_argument("--seed", type=int, default=None, help="of the moments and victims  [drawn]")
    parser.add_argument("--page", type=Path, help="write the dated Markdown page there")
    arguments = parser.parse_args()
    seed = random.randrange(1 << 32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", file=sys.stderr, flush=True)
    load = psutil.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="unclip-kills-") as folder:
        record = disturb(Path(folder), arguments.kills, seed)
    print_summary(record)
    if arguments.page:
        arguments.page.parent.mkdir(parents=True, exist_ok=True)
        arguments.page.write_text(page(record, load), encoding="utf-8")
    if record.differing:
        lines = "\n".join(record.rows_differing[:20])
        sys.exit(f"files that differ from the undisturbed run's: {', '.join(record.differing[:8])}\n{lines}")


if __name__ == "__main__":
    main()
