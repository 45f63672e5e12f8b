"""gc deletes what no manifest names, says how much that was, and leaves a driver at work alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.check import find_faults
from cluster.lease import Lease
from tests.pipeline.small_run import Pair, SmallRun

ROWS = [Pair(f"http://a.org/{number}.jpg", f"caption {number}") for number in range(12)]


@pytest.fixture
def run(tmp_path: Path) -> SmallRun:
    """Of pairs and images there is a second revision, with other bytes in each of the three shards."""
    run = SmallRun(tmp_path / "run", ROWS).build()
    run.build_images("images", run.build_pairs("pairs", list(reversed(ROWS)), amends={"order": "reversed"}))
    return run


def data_files(run: SmallRun) -> dict[str, int]:
    return {
        str(path.relative_to(run.path)): path.stat().st_size
        for path in run.path.rglob("*")
        if path.is_file() and "leases" not in path.parts
    }


def test_superseded_files_are_told_and_then_deleted(run: SmallRun, unclip: Any) -> None:
    before = data_files(run)
    dry = unclip("gc", str(run.path), "--dry-run", "--json")
    assert dry.returncode == 0 and data_files(run) == before
    found = json.loads(dry.stdout)
    done = unclip("gc", str(run.path))
    after = data_files(run)
    gone = before.keys() - after.keys()
    assert done.returncode == 0 and f"{len(gone)} files" in done.stdout
    assert found["files"] == len(gone) and found["bytes"] == sum(before[name] for name in gone)
    assert {name for name in gone if name.endswith(".tar")} == {f"images/0000000{shard}.tar" for shard in range(3)}
    for name in ("pairs", "images"):
        assert run.artifact(name).manifest.revision == 2 and list(find_faults(run.artifact(name))) == []
    again = unclip("gc", str(run.path))
    assert "nothing to delete" in again.stdout


def test_a_driver_at_work_is_left_alone(run: SmallRun, unclip: Any) -> None:
    before = data_files(run)
    with Lease(run.folder):
        refused = unclip("gc", str(run.path))
    assert refused.returncode == 2 and "is being worked on by process" in refused.stderr
    assert data_files(run) == before


def test_a_folder_that_is_no_run_is_refused(unclip: Any, tmp_path: Path) -> None:
    refused = unclip("gc", str(tmp_path))
    assert refused.returncode == 2 and "is not a run" in refused.stderr
