"""Pools and gangs on a real Ray."""

import os
import time
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
    pids = [
        {result["pid"] for result in run(session, tmp_path, [{"shard": shard} for shard in range(2)]).values()}
        for _ in range(2)
    ]
    assert pids[0] == pids[1]
    assert session.call(f"{HERE}:member", {})["RANK"] == "0"


def test_a_session_with_nothing_to_do_starts_no_ray() -> None:
    with Session(ClusterConfig()) as idle:
        idle.map_shards(f"{HERE}:Worker", {}, [])
        assert not idle.started
