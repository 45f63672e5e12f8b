"""What differs between two images artifacts is told row by row, whatever the rows' order and shards."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ingest import diff as ingest_diff
from pipeline.diff import diff_uris
from tests.pipeline.small_run import Pair, SmallRun, commit_images

ROWS = [
    Pair(f"http://a.org/{number}.{'gone' if number % 7 == 3 else 'jpg'}", f"caption {number}") for number in range(23)
]
ROWS += [ROWS[0], ROWS[11], ROWS[0]]


def built(path: Path, rows: Sequence[Pair], **more: Any) -> SmallRun:
    return SmallRun(path, rows, **more).build()


def compared(a: SmallRun, b: SmallRun) -> dict[str, Any]:
    found = diff_uris(a.folder, b.folder)
    assert json.loads(json.dumps(found)) == found, "plain data"
    both = sum(entry["rows"] for entry in found["statuses"])
    assert found["rows"]["both"] == both
    assert (both + found["rows"]["only_a"], both + found["rows"]["only_b"]) == (found["rows"]["a"], found["rows"]["b"])
    return found


def test_an_artifact_equals_itself_and_its_twin(tmp_path: Path) -> None:
    a, b = (built(tmp_path / name, ROWS) for name in "ab")
    found = compared(a, b)
    assert found["equal"] and not found["changed"] and found["rows"]["both"] == len(ROWS)
    assert diff_uris(a.folder / "images", b.folder)["equal"]


def test_a_retry_shows_as_changed_states(tmp_path: Path) -> None:
    a, b = (built(tmp_path / name, ROWS) for name in "ab")
    workshop = b.begin_images("images", b.artifact("pairs"), amends={"retry": []})
    for shard in range(b.artifact("pairs").shard_count):
        commit_images(workshop, b.artifact("pairs"), shard, fails={ROWS[5].url or ""})
    workshop.publish(b.artifact("pairs").shard_count)
    found = compared(a, b)
    assert not found["equal"] and found["changed"] == {"status": 1}
    assert {"a": "ok", "b": "fetch_failed", "rows": 1} in found["statuses"]
    assert found["reasons"] == [{"a": "ok", "b": "fetch_failed/http_404", "rows": 1}]
    assert found["examples"]["status"][0]["url"] == ROWS[5].url


def test_growth_and_loss_show_as_rows_on_one_side(tmp_path: Path) -> None:
    more = [Pair("http://new.org/1.jpg", "new"), Pair(ROWS[22].url, "the caption is another now")]
    found = compared(built(tmp_path / "a", ROWS), built(tmp_path / "b", [*ROWS[:22], *ROWS[23:], *more]))
    assert (found["rows"]["only_a"], found["rows"]["only_b"]) == (1, 2)
    assert found["changed"]["caption"] == 1
    assert found["examples"]["caption"] == [
        {"url": ROWS[22].url, "a": ["caption 22"], "b": ["the caption is another now"]}
    ]
    assert found["changed"].keys() == {"caption", "key"}, "what stands in another place is the same otherwise"


def test_another_order_of_the_same_rows_differs_in_their_places_only(tmp_path: Path) -> None:
    found = compared(built(tmp_path / "a", ROWS), built(tmp_path / "b", list(reversed(ROWS))))
    assert found["rows"]["only_a"] == found["rows"]["only_b"] == 0
    assert found["changed"].keys() <= {"key", "status"}
    moved = Counter({(entry["a"], entry["b"]): entry["rows"] for entry in found["statuses"]})
    assert {pair for pair in moved if pair[0] != pair[1]} <= {("ok", "duplicate"), ("duplicate", "ok")}


def test_removed_rows_are_told_without_what_they_were(tmp_path: Path) -> None:
    a = built(tmp_path / "a", ROWS)
    found = compared(a, built(tmp_path / "b", ROWS, removed=frozenset({ROWS[5].pair_id})))
    assert found["changed"] == {"removed": 1, "status": 1}
    assert found["examples"]["removed"] == [
        {"pair_id": ROWS[5].pair_id.hex(), "key": "000010000", "status": ["ok", "removed"]}
    ]


def test_other_pictures_are_told_apart_by_what_was_fetched_and_what_was_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = built(tmp_path / "a", ROWS)
    monkeypatch.setattr(Pair, "picture", property(lambda self: f"newer {self.url}".encode()))
    found = compared(a, built(tmp_path / "b", ROWS))
    ok = a.artifact("images").manifest.totals["counts"]["ok"]
    assert found["changed"] == {"fetched_picture": ok, "stored_picture": ok}
    assert len(found["examples"]["stored_picture"]) == ingest_diff.EXAMPLES


def test_many_buckets_on_disk_find_what_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = built(tmp_path / "a", ROWS)
    b = built(
        tmp_path / "b",
        [replace(row, caption=f"{row.caption}!") if n % 5 == 0 else row for n, row in enumerate(ROWS[2:])],
    )
    one = compared(a, b)
    monkeypatch.setattr(ingest_diff, "BUCKET_ROWS", 2)
    monkeypatch.setattr("ingest.spill.HELD_ROWS", 3)
    many = compared(a, b)
    assert {**one, "examples": {}} == {**many, "examples": {}}
    expected = _by_hand(a, b)
    assert (one["rows"]["only_a"], one["rows"]["only_b"], one["changed"]["caption"]) == expected


def _by_hand(a: SmallRun, b: SmallRun) -> tuple[int, int, int]:
    """With sets in memory: rows on one side only, and URLs among them on both sides."""
    rows = []
    for run in (a, b):
        images = run.artifact("images")
        tables = [pq.read_table(images.file(f"{entry.shard:08d}.parquet")) for entry in images.shards]
        rows.append(Counter((row["pair_id"], row["url"]) for table in tables for row in table.to_pylist()))
    only = [rows[0] - rows[1], rows[1] - rows[0]]
    urls = [{url for _, url in side} for side in only]
    return only[0].total(), only[1].total(), len(urls[0] & urls[1])


def test_the_command_says_equal_with_0_and_different_with_1(unclip: Any, tmp_path: Path) -> None:
    a, b = built(tmp_path / "a", ROWS), built(tmp_path / "b", ROWS[:-4])
    same = unclip("diff", str(a.path), str(a.path / "images"))
    assert (same.returncode, "equal, byte for byte" in same.stdout) == (0, True), same.stderr
    other = unclip("diff", str(a.path), str(b.path), "--json")
    assert other.returncode == 1 and json.loads(other.stdout)["rows"]["only_a"] == 4
    text = unclip("diff", str(a.path), str(b.path))
    assert text.returncode == 1 and "4 only in A" in text.stdout
    wrong = unclip("diff", str(a.path), str(a.path / "pairs"))
    assert wrong.returncode == 2 and "is pairs; diff compares images" in wrong.stderr
