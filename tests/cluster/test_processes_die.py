"""Actors, nodes and drivers are killed over a run of shards: every shard is committed, with the same bytes."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.check import find_faults
from cluster.config import ClusterConfig
from cluster.lease import LeaseHeld
from cluster.session import Session
from tests.cluster.shard_worker import build, content, undisturbed

pytestmark = pytest.mark.slow
SHARDS = 24
ROOT = Path(__file__).parents[2]
DRIVER = """
import sys
from pathlib import Path
from cluster.config import ClusterConfig
from cluster.session import Session
from tests.cluster.shard_worker import build
with Session(ClusterConfig(shard_actors=2)) as session:
    build(session, Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), 0.4)
"""


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    (tmp_path / "traces").mkdir()
    return tmp_path / "traces"


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    return undisturbed(tmp_path / "whole", SHARDS)


def shards_done(traces: Path) -> int:
    return len(list(traces.glob("shard-*")))


def workers(traces: Path) -> list[int]:
    """Processes of workers and their children, dead or alive."""
    return [int(number) for path in traces.glob("worker-*") for number in path.read_text().split()]


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def wait_until(true: Callable[[], bool], within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def kill_when(true: Callable[[], bool], victims: Callable[[], list[int]]) -> threading.Thread:
    def watch() -> None:
        wait_until(true)
        for pid in victims():
            os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.fixture
def two_nodes() -> Iterator[tuple[str, list[int]]]:
    """(address of a cluster of two nodes, the processes of the second one: raylet, its agents, later its workers)."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 << 20})
    second = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    pids = [entry.process.pid for entries in second.all_processes.values() for entry in entries]
    try:
        yield cluster.address, pids
    finally:
        cluster.shutdown()


def test_a_node_dies(two_nodes: tuple[str, list[int]], tmp_path: Path, traces: Path, whole: dict[str, bytes]) -> None:
    address, node = two_nodes
    doomed: list[int] = []

    def victims() -> list[int]:
        tree = [child.pid for pid in node for child in psutil.Process(pid).children(recursive=True)]
        doomed.extend(set(tree) & set(workers(traces)))
        return [*node, *tree]

    killer = kill_when(lambda: shards_done(traces) >= SHARDS // 3, victims)
    with Session(ClusterConfig(address=address, shard_actors=2)) as session:
        artifact = build(session, tmp_path / "run", traces, SHARDS, takes_s=0.3)
    killer.join()
    assert len(doomed) == 2, "a worker and its child were on the node"
    assert alive(doomed) == []
    assert content(tmp_path / "run" / "images") == whole
    assert list(find_faults(artifact)) == []


def test_an_actor_dies_and_a_session_that_ends_leaves_no_process(
    tmp_path: Path, traces: Path, whole: dict[str, bytes]
) -> None:
    killer = kill_when(lambda: shards_done(traces) >= 6, lambda: [int(next(traces.glob("worker-*")).name[7:])])
    with Session(ClusterConfig(shard_actors=2)) as session:
        build(session, tmp_path / "run", traces, SHARDS, takes_s=0.3)
    killer.join()
    assert content(tmp_path / "run" / "images") == whole
    assert len(workers(traces)) == 2 * 3
    wait_until(lambda: alive(workers(traces)) == [], 15)


def test_the_driver_dies_is_followed_by_another_and_a_third_is_told(
    tmp_path: Path, traces: Path, whole: dict[str, bytes]
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", DRIVER, str(run), str(traces), str(SHARDS)]
    first = subprocess.Popen(command, cwd=ROOT)
    wait_until(lambda: shards_done(traces) >= 5)
    first.send_signal(signal.SIGKILL)
    first.wait()
    orphans = workers(traces)
    second = subprocess.Popen(command, cwd=ROOT)
    wait_until(lambda: len(list((run / "leases").glob("*.json"))) == 2)
    with Session(ClusterConfig()) as session, pytest.raises(LeaseHeld, match=f"process {second.pid} on "):
        build(session, run, traces, SHARDS, takes_s=0.0)
    assert second.wait(120) == 0
    assert content(run / "images") == whole
    wait_until(lambda: alive(orphans) == [], 30)
