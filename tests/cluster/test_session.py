"""Pools and gangs on a real Ray."""

import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterConfig
from cluster.errors import UserError, WorkFailed
from cluster.session import Session

HERE = f"{__name__}"


class Worker:
    """Does as the task says."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def setup(self) -> None:
        self.setups = 1

    def process(self, task: dict[str, Any]) -> dict[str, Any]:
        shard, marker = task["shard"], self.folder / f"{task['shard']}.failed"
        if task.get("dies") and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), 9)
        if task.get("raises"):
            raise ValueError(f"shard {shard} is broken")
        if task.get("refuses"):
            raise UserError(f"shard {shard} asks for the impossible")
        return {"rows": shard, "pid": os.getpid(), "setups": self.setups}


class Tally:
    """One for all workers."""

    def __init__(self, start: int) -> None:
        self.count = start

    def add(self, number: int) -> dict[str, int]:
        self.count += number
        return {"count": self.count, "pid": os.getpid()}

    def report(self) -> dict[str, int]:
        return {"count": self.count, "pid": os.getpid()}


class Crowded:
    """Several tasks at once in one process; a poisoned one takes all of them with it."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.lock = threading.Lock()
        self.present = self.most = 0

    def setup(self, ask: Any = None) -> None:
        self.ask = ask

    def process(self, task: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            self.present += 1
            self.most = max(self.most, self.present)
        time.sleep(task.get("takes_s", 0.3))
        (self.folder / f"{task['shard']}-{uuid.uuid4().hex}").touch()
        if task.get("dies"):
            os.kill(os.getpid(), signal.SIGKILL)
        with self.lock:
            self.present -= 1
        told = self.ask("add", task["adds"]).result(60) if "adds" in task else {}
        return {"most": self.most, "pid": os.getpid()} | told


def member(payload: dict[str, Any], report: Any) -> dict[str, Any]:
    if payload.get("fails_on") == os.environ["RANK"]:
        raise WorkFailed("no more")
    if payload.get("waits"):
        time.sleep(60)
    for step in range(3):
        report({"step": step})
    return {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session(ClusterConfig(shard_actors=2, gang_size=2)) as open_session:
        yield open_session


def run(session: Session, folder: Path, tasks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    results = {}
    session.map_shards(
        f"{HERE}:Worker",
        {"folder": str(folder)},
        tasks,
        on_result=lambda task, result: results.__setitem__(task["shard"], result),
    )
    return results


@pytest.mark.slow
def test_every_shard_is_done_although_an_actor_is_killed(session: Session, tmp_path: Path) -> None:
    results = run(session, tmp_path, [{"shard": shard, "dies": shard in (1, 4)} for shard in range(6)])
    assert {shard: result["rows"] for shard, result in results.items()} == {shard: shard for shard in range(6)}


@pytest.mark.slow
def test_a_poisoned_shard_is_named_after_the_others_are_done(session: Session, tmp_path: Path) -> None:
    with pytest.raises(
        WorkFailed, match=r"1 of 4 shards failed; the others are done\.\n  shard 2: .*shard 2 is broken"
    ):
        run(session, tmp_path, [{"shard": shard, "raises": shard == 2} for shard in range(4)])


@pytest.mark.slow
def test_an_actor_works_on_several_shards_at_once(session: Session, tmp_path: Path) -> None:
    results: list[dict[str, Any]] = []
    tasks = [{"shard": shard} for shard in range(12)]
    session.map_shards(
        f"{HERE}:Crowded",
        {"folder": str(tmp_path)},
        tasks,
        in_flight=3,
        on_result=lambda task, result: results.append(result),
    )
    assert len(results) == 12 and max(result["most"] for result in results) == 3


@pytest.mark.slow
def test_a_shard_that_kills_its_process_is_found_among_its_neighbours(session: Session, tmp_path: Path) -> None:
    done: list[int] = []
    tasks = [{"shard": shard, "dies": shard == 4} for shard in range(12)]
    with pytest.raises(WorkFailed, match=r"1 of 12 shards failed; the others are done\.\n  shard 4: its process died"):
        session.map_shards(
            f"{HERE}:Crowded",
            {"folder": str(tmp_path)},
            tasks,
            in_flight=4,
            on_result=lambda task, result: done.append(task["shard"]),
        )
    assert sorted(done) == [shard for shard in range(12) if shard != 4]
    tries = [len(list(tmp_path.glob(f"{shard}-*"))) for shard in range(12)]
    assert tries[4] == 4 and max(tries[:4] + tries[5:]) <= 2  # once in company, then three times alone


@pytest.mark.slow
def test_where_every_shard_fails_the_run_gives_up(session: Session, tmp_path: Path) -> None:
    tasks = [{"shard": shard, "refuses": True} for shard in range(200)]
    with pytest.raises(WorkFailed, match=r"of 200 shards failed one after another; the rest was not tried"):
        run(session, tmp_path, tasks)


@pytest.mark.slow
def test_one_shared_instance_serves_all_workers_and_outlives_its_process(session: Session, tmp_path: Path) -> None:
    pids: list[int] = []
    results: list[dict[str, int]] = []

    def on_shared(report: dict[str, int]) -> None:
        pids.append(report["pid"])
        if len(results) >= 10 and pids[-1] == pids[0]:
            os.kill(report["pid"], signal.SIGKILL)

    session.map_shards(
        f"{HERE}:Crowded",
        {"folder": str(tmp_path)},
        [{"shard": shard, "adds": 1} for shard in range(80)],
        shared=(f"{HERE}:Tally", {"start": 1000}),
        in_flight=2,
        on_result=lambda task, result: results.append(result),
        on_shared=on_shared,
    )
    before, after = (
        [result["count"] for result in results if (result["pid"] == pids[0]) == of_first] for of_first in (True, False)
    )
    assert len(before) + len(after) == 80 and len(before) >= 10 and len(after) >= 10
    assert sorted(after) == list(range(1001, 1001 + len(after)))  # the new one knows nothing of the old one
    assert len(set(before)) == len(before) and min(before) == 1001


@pytest.mark.slow
def test_more_processes_than_the_cluster_has_room_for_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, session: Session
) -> None:
    monkeypatch.setattr("cluster.pool.START_TIMEOUT_S", 4.0)
    session.map_shards(f"{HERE}:Worker", {"folder": str(tmp_path)}, [{"shard": 0}])
    crowd = Session(ClusterConfig(shard_actors=5))
    crowd._ray = session._ray
    with pytest.raises(WorkFailed, match=r"found no place in 4 s.*the cluster has 2 on 1 nodes.*cluster\.shard_actors"):
        crowd.map_shards(
            f"{HERE}:Crowded", {"folder": str(tmp_path)}, [{"shard": shard, "takes_s": 9} for shard in range(9)]
        )
    crowd._release()


@pytest.mark.slow
def test_a_gang_knows_its_ranks_and_reports_while_it_works(session: Session) -> None:
    reports: list[dict[str, Any]] = []
    results = session.run_gang(f"{HERE}:member", {}, on_report=reports.append)
    assert [result["RANK"] for result in results] == ["0", "1"]
    assert {(result["WORLD_SIZE"], result["MASTER_PORT"]) for result in results} == {("2", results[0]["MASTER_PORT"])}
    assert [report["step"] for report in reports] == [0, 1, 2]


@pytest.mark.slow
def test_a_member_that_fails_ends_its_fellows(session: Session) -> None:
    started = time.monotonic()
    with pytest.raises(WorkFailed, match="no more"):
        session.run_gang(f"{HERE}:member", {"fails_on": "1", "waits": True})
    assert time.monotonic() - started < 30
    assert len(session.run_gang(f"{HERE}:member", {})) == 2


@pytest.mark.slow
def test_pools_and_gangs_are_warm_for_the_next_stage(session: Session, tmp_path: Path) -> None:
    first, second = (
        {result["pid"] for result in run(session, tmp_path, [{"shard": shard} for shard in range(20)]).values()}
        for _ in range(2)
    )
    assert first <= second
    assert session.call(f"{HERE}:member", {})["RANK"] == "0"


def test_a_session_with_nothing_to_do_starts_no_ray() -> None:
    with Session(ClusterConfig()) as idle:
        idle.map_shards(f"{HERE}:Worker", {}, [])
        assert not idle.started
