"""What status tells of a run: rows by outcome, what fails, what is held, what is unfinished, what is broken."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.lease import Lease
from pipeline import status
from pipeline.status import status_of
from pipeline.takedown import take_down
from tests.pipeline.small_run import Pair, SmallRun, commit_images

ROWS = [Pair(f"http://h{n % 3}.org/{n}.{'gone' if n % 4 == 1 else 'jpg'}", f"caption {n}") for n in range(22)]


@pytest.fixture
def run(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path / "run", ROWS, ROWS[:3]).build()


def stage(found: dict[str, Any], name: str) -> dict[str, Any]:
    (plain,) = (plain for plain in found["stages"] if plain["name"] == name)
    return dict(plain)


def test_rows_by_outcome_top_reasons_and_failing_hosts(run: SmallRun) -> None:
    found = status_of(run.folder)
    failed = sum(row.url is not None and row.url.endswith(".gone") for row in ROWS)
    assert found["outcomes"] == {"ok": len(ROWS) - failed, "fetch_failed": failed}
    assert found["reasons"] == {"fetch_failed/http_404": failed}
    hosts = [f"h{n % 3}.org" for n in range(22) if n % 4 == 1]
    assert found["failing_hosts"] == {host: hosts.count(host) for host in sorted(set(hosts))}
    assert (found["broken"], found["held"], found["driver"]) == ([], [], None)
    assert (stage(found, "images")["state"], stage(found, "clip")["state"]) == ("published", "waiting")


def test_of_very_many_shards_some_receipts_are_read_and_the_outcomes_stay_exact(
    run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = status_of(run.folder)
    monkeypatch.setattr(status, "RECEIPTS_READ", 2)
    found = status_of(run.folder)
    assert (found["read"], found["of"], exact["read"]) == (2, 5, 5)
    assert found["outcomes"] == exact["outcomes"]
    assert 0 < found["reasons"]["fetch_failed/http_404"] < exact["reasons"]["fetch_failed/http_404"]


def test_images_in_the_making_show_what_is_done_so_far(run: SmallRun) -> None:
    (run.path / "images" / "manifest.json").unlink()
    found = status_of(run.folder)
    images = stage(found, "images")
    assert (images["state"], images["shards"], images["shards_total"]) == ("unfinished", 5, 5)
    assert sum(found["outcomes"].values()) == len(ROWS)


def test_an_unfinished_revision_says_what_it_amends(run: SmallRun, unclip: Any) -> None:
    amends = {"retry": ["fetch_failed"], "revision": 1}
    workshop = run.begin_images("images", run.artifact("pairs"), amends=amends)
    commit_images(workshop, run.artifact("pairs"), 0)
    found = status_of(run.folder)
    assert stage(found, "images")["unfinished"] == {"revision": 2, "shards": 1, "amends": amends}
    assert stage(found, "images")["state"] == "published"
    text = unclip("status", str(run.path))
    assert text.returncode == 0
    assert "revision 2 (retry fetch_failed) is unfinished, 1 shards of it are done" in text.stdout


def test_held_shards_are_named_and_fail(run: SmallRun, unclip: Any) -> None:
    for name, shard in (("images", 3), ("evaluation/copies/images", 0)):
        held = {"revision": 1, "shards": {str(shard): {"why": "1.0% of its rows succeeded"}}}
        (run.path / name / "held.json").write_text(json.dumps(held))
    found = status_of(run.folder)
    assert {(held["artifact"], held["shard"]) for held in found["held"]} == {
        ("images", 3), ("evaluation/copies/images", 0),
    }  # fmt: skip
    text = unclip("status", str(run.path))
    assert text.returncode == 1
    assert "held: images shard 3: 1.0% of its rows succeeded" in text.stdout and "--accept 3 " in text.stdout


def test_a_driver_at_work_tells_its_rate_its_time_left_and_an_outage(run: SmallRun, unclip: Any) -> None:
    moving = {"name": "images", "state": "running", "done": 10, "total": 22, "unit": "rows", "note": "2/5 shards"}
    moving |= {"seconds": 12.0, "rate": 0.8, "left_s": 15.0, "warning": "no host answers: fetching pauses"}
    (run.path / "progress.json").write_text(json.dumps({"time": 0, "stages": [moving]}))
    assert stage(status_of(run.folder), "images")["state"] == "published", "nobody is at work"
    with Lease(run.folder):
        text = unclip("status", str(run.path)).stdout
        images = stage(status_of(run.folder), "images")
    assert (images["state"], images["left_s"], images["warning"]) == ("running", 15.0, moving["warning"])
    assert "is at work" in text and "no host answers: fetching pauses" in text and "15 s" in text


def test_removed_pairs_and_a_takedown_that_was_killed_are_told(run: SmallRun, tmp_path: Path, unclip: Any) -> None:
    (tmp_path / "list").write_text("h1.org\n")
    take_down(run.folder, "domains", tmp_path / "list")
    found = status_of(run.folder)
    assert found["removed"] == found["outcomes"]["removed"] == 7 and found["takedown"] is None
    assert "h1.org" not in found["failing_hosts"]
    record = run.path / "takedowns" / "1.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"state": "begun"}))
    assert status_of(run.folder)["takedown"] == 1
    assert "takedown 1 was not brought to its end" in unclip("status", str(run.path)).stdout


def test_a_missing_file_is_broken(run: SmallRun, unclip: Any) -> None:
    (run.path / "images" / "00000002.tar").unlink()
    (run.path / "pairs" / "receipts" / "00000001.json").unlink()
    text = unclip("status", str(run.path))
    assert text.returncode == 1
    assert "broken: images: 00000002.tar: missing" in text.stdout and "broken: pairs: shard 1" in text.stdout
