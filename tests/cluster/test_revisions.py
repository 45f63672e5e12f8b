"""Later revisions: what they inherit, what they redo, and which unfinished one is gone on with."""

import time
from pathlib import Path

import pytest

from cluster.artifact import Artifact, Request
from cluster.check import find_faults
from cluster.environment import environment
from cluster.errors import WorkFailed
from cluster.storage import Folder
from cluster.workshop import Workshop, begin

REQUEST = Request("images", 1, {"size": 64}, {"pairs": "ab"})


def commit(workshop: Workshop, shard: int, text: str, made_from: str = "") -> None:
    with workshop.attempt(shard) as attempt:
        attempt.path(f"{shard:08d}.txt").write_text(text)
        attempt.commit(rows=len(text), counts={"ok": len(text)}, stats={"seconds": time.time()}, made_from=made_from)


def published(folder: Path, texts: list[str]) -> Artifact:
    workshop = begin(Folder(folder), REQUEST, environment())
    for shard, text in enumerate(texts):
        commit(workshop, shard, text, made_from=f"pairs{shard}")
    return workshop.publish(len(texts))


def texts_of(artifact: Artifact) -> list[str]:
    return [artifact.file(f"{entry.shard:08d}.txt").read_text() for entry in artifact.shards]


def test_a_revision_inherits_shards_as_they_are_and_makes_the_others(tmp_path: Path) -> None:
    first = published(tmp_path, ["a", "bb", "c"])
    second = begin(Folder(tmp_path), REQUEST, environment(), amends={"retry": ["fetch_failed"]})
    commit(second, 1, "retried", made_from="pairs1")
    new = second.publish(3, inherit={shard: first.shards[shard] for shard in (0, 2)})
    assert (texts_of(new), new.rows, new.manifest.totals["counts"]) == (["a", "retried", "c"], 9, {"ok": 9})
    assert [entry.files[0].stored_as for entry in new.shards] == ["00000000.txt", "00000001-r2.txt", "00000002.txt"]
    assert [entry.made_from for entry in new.shards] == ["pairs0", "pairs1", "pairs2"]
    assert list(find_faults(new)) == [] and list(find_faults(first)) == []


def test_an_inherited_shards_receipt_is_its_own_though_a_later_revision_left_one_beside_it(tmp_path: Path) -> None:
    first = published(tmp_path, ["a"])
    abandoned = begin(Folder(tmp_path), REQUEST, environment(), amends={"retry": ["refused"]})
    commit(abandoned, 0, "never published")
    third = begin(Folder(tmp_path), REQUEST, environment(), amends={"retry": ["fetch_failed"]})
    assert third.revision == 3
    new = third.publish(1, inherit={0: first.shards[0]})
    assert new.receipt(0) == first.receipt(0)
    assert list(find_faults(new)) == []


def test_what_a_shard_was_made_from_is_no_part_of_its_content(tmp_path: Path) -> None:
    digests = set()
    for name in ("x", "y"):
        workshop = begin(Folder(tmp_path / name), REQUEST, environment())
        commit(workshop, 0, "same", made_from=name)
        digests.add(workshop.publish(1).content_digest)
    assert len(digests) == 1


def test_a_missing_shard_is_named_though_others_are_inherited(tmp_path: Path) -> None:
    first = published(tmp_path, ["a", "b"])
    second = begin(Folder(tmp_path), REQUEST, environment(), amends={"grow": 1})
    with pytest.raises(WorkFailed, match=r"no receipt of shards \[2\]"):
        second.publish(3, inherit=dict(enumerate(first.shards)))


def test_an_unfinished_revision_is_gone_on_with_for_the_same_change_only(tmp_path: Path) -> None:
    published(tmp_path, ["a"])
    retry = {"retry": ["fetch_failed"]}
    revisions = [
        begin(Folder(tmp_path), REQUEST, environment(), amends=amends).revision
        for amends in (retry, retry, {"retry": ["refused"]}, None, None)
    ]
    assert revisions == [2, 2, 3, 4, 4]


def test_a_discarded_shard_is_made_again_and_its_old_attempt_can_touch_nothing(tmp_path: Path) -> None:
    workshop = begin(Folder(tmp_path), REQUEST, environment())
    commit(workshop, 0, "held")
    old = workshop.receipt(0)
    assert old is not None
    for _ in range(2):
        workshop.discard(0)
        assert workshop.committed() == set() and workshop.receipt(0) is None
    commit(workshop, 0, "better")
    workshop._settle(old)  # the old attempt's process was only asleep
    assert texts_of(workshop.publish(1)) == ["better"]


def test_a_discarded_claim_is_free_for_an_attempt_that_had_lost_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = begin(Folder(tmp_path), REQUEST, environment())
    commit(workshop, 0, "held")
    create, tries = Folder.create, []

    def discarded_in_between(folder: Folder, name: str, data: bytes) -> bool:
        tries.append(create(folder, name, data))
        if len(tries) == 1:
            workshop.discard(0)
        return tries[-1]

    monkeypatch.setattr(Folder, "create", discarded_in_between)
    commit(workshop, 0, "better")
    assert tries == [False, True]
    assert texts_of(workshop.publish(1)) == ["better"]
