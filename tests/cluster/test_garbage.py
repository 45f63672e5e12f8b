"""What `gc` may take, and what it must leave."""

import random
from pathlib import Path

from cluster.artifact import Artifact, Request
from cluster.check import find_faults
from cluster.environment import environment
from cluster.garbage import collect, delete
from cluster.storage import Folder
from cluster.workshop import Attempt, Workshop, begin

REQUEST = Request("images", 1, {"size": 64}, {"pairs": "ab"})


def commit(workshop: Workshop, shard: int, text: str) -> None:
    with workshop.attempt(shard) as attempt:
        attempt.path(f"{shard:08d}.txt").write_text(text)
        attempt.commit(rows=len(text), counts={"ok": len(text)})


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def begun(folder: Path, amends: dict[str, int] | None = None) -> Workshop:
    return begin(Folder(folder), REQUEST, environment(), amends=amends)


def two_revisions(folder: Path) -> Artifact:
    """The second inherits shard 0 and replaces shard 1."""
    first = begun(folder)
    for shard in range(2):
        commit(first, shard, "old")
    old = first.publish(2)
    second = begun(folder, {"retry": 1})
    commit(second, 1, "new")
    return second.publish(2, inherit={0: old.shards[0]})


def test_superseded_files_go_and_inherited_ones_stay(tmp_path: Path) -> None:
    artifact = two_revisions(tmp_path)
    assert collect(artifact.folder) == ["00000001.txt", "receipts/00000001.json", "shards.parquet"]
    delete(artifact.folder, collect(artifact.folder))
    assert collect(artifact.folder) == []
    assert files(tmp_path) == {
        "manifest.json",
        "request.json",
        "request-r2.json",
        "shards-r2.parquet",
        "00000000.txt",
        "00000001-r2.txt",
        "receipts/00000000.json",
        "receipts/00000001-r2.json",
    }
    assert list(find_faults(Artifact.open(str(tmp_path)))) == []


def test_an_unfinished_newest_revision_stays_whole_and_can_be_gone_on_with(tmp_path: Path) -> None:
    artifact = two_revisions(tmp_path)
    third = begun(tmp_path, {"retry": 2})
    commit(third, 0, "newest")
    claimed = third.attempt(1)
    claimed.path("00000001.txt").write_text("claimed")
    settle, Workshop._settle = Workshop._settle, lambda self, receipt: None  # type: ignore[method-assign]
    try:
        claimed.commit(rows=7, counts={"ok": 7})  # killed between claim and settle
    finally:
        Workshop._settle = settle  # type: ignore[method-assign]
    dead = third.attempt(2)
    dead.path("00000002.txt").write_text("killed before its claim")
    found = collect(artifact.folder)
    assert [name for name in found if name.startswith(".staging")] == [f".staging/00000002-{dead._attempt}"]
    assert not [name for name in found if "-r3" in name or "-r2" in name]
    delete(artifact.folder, found)
    new = third.publish(2)
    assert [new.file(f"{shard:08d}.txt").read_text() for shard in range(2)] == ["newest", "claimed"]


def test_what_workers_of_a_driver_at_work_are_writing_stays(tmp_path: Path) -> None:
    artifact = two_revisions(tmp_path)
    with Attempt(begun(tmp_path, {"retry": 2}), 0) as attempt:
        attempt.path("00000000.txt").write_text("half")
        (tmp_path / "receipts" / ".00000000-r3.json.0123").write_text("{")
        at_work = collect(artifact.folder, at_work=True)
        left = collect(artifact.folder)
    assert not any(".staging" in name or "/." in name for name in at_work)
    assert set(left) - set(at_work) == {f".staging/00000000-{attempt._attempt}", "receipts/.00000000-r3.json.0123"}


def test_abandoned_revisions_and_discarded_receipts_go(tmp_path: Path) -> None:
    workshop = begun(tmp_path)
    commit(workshop, 0, "held")
    workshop.discard(0)
    commit(workshop, 0, "old")
    workshop.publish(1)
    commit(begun(tmp_path, {"retry": 1}), 0, "abandoned")
    last = begun(tmp_path, {"retry": 2})
    commit(last, 0, "new")
    last.publish(1)
    delete(last.folder, collect(last.folder))
    assert {name for name in files(tmp_path) if "0000000" in name} == {"00000000-r3.txt", "receipts/00000000-r3.json"}


def test_notes_scratch_of_the_published_revision_and_other_artifacts_stay(tmp_path: Path) -> None:
    artifact = two_revisions(tmp_path)
    for name in ("work/old", "work-r2/checkpoint", "web/images/00000000.tar", "held.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert set(collect(artifact.folder)) == {"00000001.txt", "receipts/00000001.json", "shards.parquet", "work"}


def test_a_folder_that_is_no_artifact_has_no_garbage(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    assert collect(Folder(tmp_path)) == []


def test_deleting_may_stop_anywhere(tmp_path: Path) -> None:
    artifact = two_revisions(tmp_path)
    found = collect(artifact.folder)
    delete(artifact.folder, random.sample(found, 2))
    assert list(find_faults(Artifact.open(str(tmp_path)))) == []
    delete(artifact.folder, collect(artifact.folder))
    assert collect(artifact.folder) == []
