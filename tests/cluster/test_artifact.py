"""The artifact protocol: what is published, what a kill leaves, who wins a race."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.artifact import Artifact, Request, read_manifest
from cluster.check import find_faults
from cluster.environment import environment
from cluster.errors import ArtifactNotFound, UserError, WorkFailed
from cluster.storage import Folder
from cluster.workshop import Attempt, Workshop, begin

REQUEST = Request("images", 1, {"size": 64}, {"pairs": "ab"})


def workshop_at(path: Path, request: Request = REQUEST) -> Workshop:
    return begin(Folder(path), request, environment())


def commit(workshop: Workshop, shard: int, text: str) -> None:
    with workshop.attempt(shard) as attempt:
        attempt.path(f"{shard:08d}.txt").write_text(text)
        attempt.commit(rows=len(text), counts={"ok": len(text)}, stats={"seconds": time.time()})


def tree(folder: Path) -> dict[str, bytes]:
    """What a reader sees: everything but receipts (they record hosts and times) and private names."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "receipts" not in path.parts and not any(part.startswith(".") for part in path.parts)
    }


def test_nothing_is_an_artifact_before_its_manifest(tmp_path: Path) -> None:
    commit(workshop_at(tmp_path / "a"), 0, "x")
    with pytest.raises(ArtifactNotFound):
        Artifact.open(str(tmp_path / "a"))


def test_two_builds_of_the_same_content_are_the_same_bytes(tmp_path: Path) -> None:
    for name, order in (("a", (0, 1, 2)), ("b", (2, 0, 1))):
        workshop = workshop_at(tmp_path / name)
        for shard in order:
            commit(workshop, shard, "x" * (shard + 1))
        workshop.publish(3)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_publishing_with_a_shard_missing_is_refused_and_names_it(tmp_path: Path) -> None:
    workshop = workshop_at(tmp_path / "a")
    commit(workshop, 0, "x")
    with pytest.raises(WorkFailed, match=r"no receipt of shards \[1\]"):
        workshop.publish(2)
    assert read_manifest(Folder(tmp_path / "a")) is None


def test_the_first_receipt_wins_and_the_loser_leaves_no_bytes(tmp_path: Path) -> None:
    workshop = workshop_at(tmp_path / "a")
    with workshop.attempt(0) as slow:
        slow.path("00000000.txt").write_text("slow")
        commit(workshop, 0, "fast")
        receipt = slow.commit(rows=4, counts={"ok": 4})
    assert receipt == workshop.receipt(0)
    artifact = workshop.publish(1)
    assert artifact.file("00000000.txt").read_text() == "fast"
    assert not (tmp_path / "a" / ".staging").exists()


def test_a_shard_claimed_but_not_settled_is_finished_by_whoever_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = workshop_at(tmp_path / "a")
    attempt = workshop.attempt(0)
    attempt.path("00000000.txt").write_text("x")
    monkeypatch.setattr(Workshop, "_settle", lambda self, receipt: None)  # killed right after the claim
    attempt.commit(rows=1, counts={"ok": 1})
    monkeypatch.undo()
    assert not (tmp_path / "a" / "00000000.txt").exists()
    assert Workshop(str(tmp_path / "a"), 1).publish(1).file("00000000.txt").read_text() == "x"


def test_differing_lists_are_told_by_their_items_and_long_values_are_cut() -> None:
    asked = Request("pairs", 1, {"files": [{"name": "a", "bytes": 1}, {"name": "b", "bytes": 2}]}, {})
    there = {**asked.identity, "settings": {"files": [{"name": "a", "bytes": 1}, {"name": "b", "bytes": 3}]}}
    assert asked.differing_fields(there) == ["settings.files[1].bytes: 3 → 2"]
    longer = {**asked.identity, "settings": {"files": [{"name": "x" * 200}]}}
    assert all(len(line) < 250 for line in asked.differing_fields(longer))


def _build(path: str, started: "multiprocessing.synchronize.Event") -> None:
    started.set()
    if read_manifest(Folder(path)) is not None:
        return  # as the runner does: what is published is not begun again
    workshop = begin(Folder(path), REQUEST, environment())
    for shard in sorted(set(range(200)) - workshop.committed()):
        commit(workshop, shard, f"shard {shard}" * 50)
    workshop.publish(200)


def test_sigkill_at_any_moment_loses_nothing_and_leaves_no_half_shard(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    kills = 0
    for delay_s in (0.0, 0.01, 0.03, 0.07, 0.15, 0.2, None):
        started = spawn.Event()
        process = spawn.Process(target=_build, args=(str(tmp_path / "a"), started))
        process.start()
        assert started.wait(60)
        if delay_s is not None:
            time.sleep(delay_s)
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    undisturbed = workshop_at(tmp_path / "b")
    for shard in range(200):
        commit(undisturbed, shard, f"shard {shard}" * 50)
    undisturbed.publish(200)
    assert kills >= 1
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert list(find_faults(Artifact.open(str(tmp_path / "a")))) == []


def test_a_later_revision_stands_beside_the_old_one_until_its_manifest(tmp_path: Path) -> None:
    first = workshop_at(tmp_path / "a")
    commit(first, 0, "old")
    old = first.publish(1)
    changed = Request("images", 1, {"size": 64}, {"pairs": "cd"})
    second = workshop_at(tmp_path / "a", changed)
    assert second.revision == 2 and second.committed() == set()
    commit(second, 0, "new")
    assert Artifact.open(str(tmp_path / "a")).file("00000000.txt").read_text() == "old"
    new = second.publish(1)
    assert new.file("00000000.txt").read_text() == "new"
    assert old.file("00000000.txt").read_text() == "old"
    assert new.content_digest != old.content_digest


def test_equal_bytes_in_a_later_revision_have_an_equal_content_digest(tmp_path: Path) -> None:
    digests = []
    for pairs in ("ab", "cd"):
        workshop = workshop_at(tmp_path / "a", Request("images", 1, {"size": 64}, {"pairs": pairs}))
        commit(workshop, 0, "same")
        digests.append(workshop.publish(1).content_digest)
    assert digests[0] == digests[1]


def test_an_unfinished_build_under_other_library_versions_stops_unless_allowed(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "a")
    begin(folder, REQUEST, {"torch": "1"})
    with pytest.raises(UserError, match=r"torch: '1' → '2'.*--allow-mixed"):
        begin(folder, REQUEST, {"torch": "2"})
    assert begin(folder, REQUEST, {"torch": "2"}, allow_mixed=True).revision == 1


def test_differing_fields_are_named_with_both_values() -> None:
    asked = Request("images", 1, {"size": 64, "filters": {"min_side": None}}, {})
    there = json.loads(json.dumps(asked.identity)) | {"settings": {"size": 32, "filters": {"min_side": 8}}}
    assert asked.differing_fields(there) == ["settings.filters.min_side: 8 → None", "settings.size: 32 → 64"]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "00000001.txt").write_text("xy"), "2 bytes, 1 are promised"),
        (lambda folder: (folder / "00000001.txt").write_text("y"), "not those of the receipt"),
        (lambda folder: (folder / "00000001.txt").unlink(), "missing"),
        (lambda folder: (folder / "receipts" / "00000001.json").unlink(), "its receipt is missing"),
        (lambda folder: shutil.copy(folder / "00000000.txt", folder / "shards.parquet"), "not the table"),
    ],
)
def test_damage_is_found(tmp_path: Path, damage: object, told: str) -> None:
    workshop = workshop_at(tmp_path / "a")
    commit(workshop, 0, "x")
    commit(workshop, 1, "z")
    workshop.publish(2)
    damage(tmp_path / "a")  # type: ignore[operator]
    assert any(told in fault for fault in find_faults(Artifact.open(str(tmp_path / "a"))))


def test_reading_an_artifact_starts_no_thread_that_could_outlive_the_process(tmp_path: Path) -> None:
    workshop = workshop_at(tmp_path / "a")
    commit(workshop, 0, "x")
    workshop.publish(1)
    code = (
        "import os; from cluster.artifact import Artifact\n"
        f"artifact = Artifact.open({str(tmp_path / 'a')!r}); before = os.listdir('/proc/self/task')\n"
        "assert artifact.shards and os.listdir('/proc/self/task') == before"
    )
    ended = [subprocess.run([sys.executable, "-c", code], capture_output=True).returncode for _ in range(4)]
    assert ended == [0] * 4


def test_the_protocol_holds_on_an_object_store(tmp_path: Path) -> None:
    folder = Folder(f"memory://{tmp_path.name}/a")
    workshop = begin(folder, REQUEST, environment())
    with Attempt(workshop, 0) as slow:
        slow.path("00000000.txt").write_text("slow")
        commit(workshop, 0, "fast")
        slow.commit(rows=4, counts={"ok": 4})
    workshop.publish(1)
    assert Artifact.open(folder.uri).file("00000000.txt").read_text() == "fast"
    assert [name for name in folder.names() if name.startswith(".")] == []
