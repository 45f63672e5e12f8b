"""A takedown leaves what a run would have been without these rows, whenever it is killed."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster.artifact import Receipt
from cluster.canonical import digest
from cluster.check import find_faults
from cluster.errors import UserError
from cluster.lease import Lease, LeaseHeld
from cluster.storage import Folder
from embed.split import TRAIN, split_of
from ingest.removal import read_tombstones
from ingest.verify import find_image_faults
from pipeline.takedown import finish_takedown, pending_takedown, take_down
from tests.pipeline.small_run import VALIDATION, Pair, SmallRun, commit_images

SECRET = "http://img.secret.org/secret.jpg"
ROWS = [
    *(Pair(f"http://a.org/{number}.jpg", f"caption {number}") for number in range(6)),
    Pair(SECRET, "a secret caption"),
    Pair(SECRET, "another secret caption"),
    Pair("http://a.org/0.jpg", "caption 0"),
    Pair("http://b.org/x.gone", "not there"),
    *(Pair(f"http://c.org/{number}.jpg", f"caption {number}") for number in range(6)),
    Pair("https://IMG.secret.org:443/./secret.jpg#top", "a third secret caption"),
    Pair("http://www.secret.org/secret.gone", "a fourth secret caption"),
]
EVALUATION = [Pair("http://e.org/0.jpg", "a held-out caption"), Pair(SECRET, "a secret held-out caption")]
SECRETS = [row for row in (*ROWS, *EVALUATION) if row.url and "secret" in row.url.lower()]
STEP, COPIES = 5, 200
ARTIFACTS = ("pairs", "images", "evaluation/copies/pairs", "evaluation/copies/images")


@pytest.fixture
def run(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path / "run", ROWS, EVALUATION).build()


@pytest.fixture
def listed(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: str) -> Path:
        path = tmp_path / "list.txt"
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


def without(tmp_path: Path, removed: list[Pair]) -> SmallRun:
    """The run as it would have been, had its ingest known that these rows are removed."""
    return SmallRun(tmp_path / "reference", ROWS, EVALUATION, frozenset(row.pair_id for row in removed)).build()


def assert_equal(run: SmallRun, reference: SmallRun) -> None:
    for name in ARTIFACTS:
        ours, theirs = run.artifact(name), reference.artifact(name)
        assert ours.content_digest == theirs.content_digest, name
        assert ours.manifest.totals == theirs.manifest.totals
        assert ours.manifest.identity == theirs.manifest.identity, "images name the new pairs"
        assert [entry.made_from for entry in ours.shards] == [entry.made_from for entry in theirs.shards]
        assert list(find_faults(ours)) == []
    for prefix in ("", "evaluation/copies/"):
        assert list(find_image_faults(run.artifact(f"{prefix}images"), run.artifact(f"{prefix}pairs"))) == []


def named_files(run: SmallRun) -> Iterator[Path]:
    """The files of pairs and images that a manifest names, with their receipts."""
    for name in ARTIFACTS:
        artifact = run.artifact(name)
        for entry in artifact.shards:
            yield from (Path(artifact.uri) / file.stored_as for file in entry.files)
            revision = next(file.stored_as.removeprefix(f"{entry.shard:08d}").split(".")[0] for file in entry.files)
            yield Path(artifact.uri) / "receipts" / f"{entry.shard:08d}{revision}.json"


def holds_a_secret(path: Path) -> bool:
    said = repr(pq.read_table(path).to_pylist()).encode() if path.suffix == ".parquet" else path.read_bytes()
    return b"secret" in said.lower()


def test_rows_of_a_domain_leave_pairs_images_and_evaluation_sets(
    run: SmallRun, tmp_path: Path, listed: Callable[..., Path]
) -> None:
    before = {name: run.artifact(name) for name in ARTIFACTS}
    assert any(holds_a_secret(path) for path in named_files(run))
    taken = take_down(run.folder, "domains", listed("# a comment", "", "secret.org"))
    assert taken["matched"] == {"pairs": {"domain": 4}, "evaluation/copies/pairs": {"domain": 1}}
    assert taken["artifacts"]["images"] == {"rows": 4, "shards": 2, "in_the_making": 0}
    assert_equal(run, without(tmp_path, SECRETS))
    assert not any(holds_a_secret(path) for path in named_files(run))
    images = run.artifact("images")
    assert images.manifest.totals["counts"]["removed"] == 4
    assert [entry.files == old.files for entry, old in zip(images.shards, before["images"].shards, strict=True)] == [
        True, False, True, False,
    ]  # fmt: skip
    assert read_tombstones(run.folder).pair_ids.to_pylist() == sorted(row.pair_id for row in SECRETS)


def test_a_url_is_found_as_it_is_spelled_and_in_its_normalised_form(
    run: SmallRun, tmp_path: Path, listed: Callable[..., Path]
) -> None:
    taken = take_down(run.folder, "urls", listed(SECRET))
    assert taken["matched"]["pairs"] == {"exact": 2, "normalised": 1}
    assert_equal(run, without(tmp_path, [row for row in SECRETS if row.url and not row.url.endswith(".gone")]))


@pytest.mark.parametrize("of", ["image_sha256", "stored_sha256"])
def test_a_picture_is_found_by_the_hash_of_its_bytes(
    run: SmallRun, tmp_path: Path, listed: Callable[..., Path], of: str
) -> None:
    ledger = pq.read_table(run.artifact("images").file("00000001.parquet")).to_pylist()
    digest = next(row[of] for row in ledger if row["url"] == SECRET)
    taken = take_down(run.folder, "image_hashes", listed(digest.upper()))
    assert taken["pairs"] == 3, "two captions in training, one in the evaluation set"
    assert_equal(run, without(tmp_path, [row for row in SECRETS if row.url == SECRET]))


def test_every_row_of_a_pair_id_goes_its_duplicates_too(
    run: SmallRun, tmp_path: Path, listed: Callable[..., Path]
) -> None:
    taken = take_down(run.folder, "pairs", listed(ROWS[0].pair_id.hex()))
    assert taken["artifacts"]["pairs"] == {"rows": 2, "shards": 2}
    assert_equal(run, without(tmp_path, [ROWS[0]]))


def test_a_pair_id_that_no_row_has_is_kept_for_later_ingests(run: SmallRun, listed: Callable[..., Path]) -> None:
    digests = [run.artifact(name).content_digest for name in ARTIFACTS]
    taken = take_down(run.folder, "pairs", listed("ab" * 16))
    assert taken["artifacts"] == {} and pending_takedown(run.folder) is None
    assert read_tombstones(run.folder).pair_ids.to_pylist() == [b"\xab" * 16]
    assert [run.artifact(name).content_digest for name in ARTIFACTS] == digests


def test_nothing_matched_changes_nothing(run: SmallRun, listed: Callable[..., Path]) -> None:
    before = sorted(run.path.rglob("*.*"))
    taken = take_down(run.folder, "domains", listed("elsewhere.org"))
    assert "takedown" not in taken and taken["pairs"] == 0
    assert [path for path in sorted(run.path.rglob("*.*")) if path not in before and "leases" not in path.parts] == []


def test_the_same_list_again_finds_its_rows_gone(run: SmallRun, listed: Callable[..., Path]) -> None:
    path = listed(ROWS[0].pair_id.hex())
    take_down(run.folder, "pairs", path)
    again = take_down(run.folder, "pairs", path)
    assert (again["pairs"], again["earlier"]) == (1, 1) and "takedown" not in again


def test_a_second_takedown_adds_to_the_first(run: SmallRun, tmp_path: Path, listed: Callable[..., Path]) -> None:
    assert take_down(run.folder, "domains", listed("secret.org"))["takedown"] == 1
    second = take_down(run.folder, "urls", listed("http://c.org/3.jpg"))
    assert second["takedown"] == 2 and second["artifacts"]["images"] == {"rows": 1, "shards": 1, "in_the_making": 0}
    assert_equal(run, without(tmp_path, [*SECRETS, Pair("http://c.org/3.jpg", "caption 3")]))


def test_models_and_checkpoints_that_saw_a_removed_row_are_listed(run: SmallRun, listed: Callable[..., Path]) -> None:
    for name in ("clip", "prior"):
        run.build_model(name)
    taken = take_down(run.folder, "domains", listed("secret.org"))
    seen = [row for row in SECRETS if row not in EVALUATION and row.url and not row.url.endswith(".gone")]
    trained = sum(split_of(row.pair_id, VALIDATION) == TRAIN for row in seen)
    assert trained > 0
    assert taken["models"] == [
        {"model": model, "at": at, "rows": trained, "exact": True}
        for model in ("clip", "prior")
        for at in ("revision 1", "step 400")
    ]
    assert take_down(run.folder, "urls", listed("http://b.org/x.gone"))["models"] == [], "it was never seen"


def test_the_record_tells_nothing_of_the_rows(run: SmallRun, listed: Callable[..., Path]) -> None:
    take_down(run.folder, "domains", listed("secret.org"))
    record = (run.path / "takedowns" / "1.json").read_text()
    assert json.loads(record)["state"] == "finished" and json.loads(record)["was_ok"] == 3
    assert "secret" not in record and not any(row.pair_id.hex() in record for row in SECRETS)
    assert pq.read_schema(run.path / "removed.parquet").names == ["pair_id"]


def test_superseded_files_hold_the_rows_until_they_are_purged(run: SmallRun, listed: Callable[..., Path]) -> None:
    def secrets() -> list[Path]:
        return [path for path in run.path.rglob("*") if path.is_file() and holds_a_secret(path)]

    take_down(run.folder, "domains", listed("secret.org"))
    assert secrets(), "they stay readable for who has the old revision open"
    taken = take_down(run.folder, "domains", listed("secret.org"), purge=True)
    assert secrets() == []
    assert taken["purged"]["images"]["files"] >= 2 * 2
    for name in ARTIFACTS:
        assert list(find_faults(run.artifact(name))) == []


def test_a_first_fetch_that_is_half_done_is_gone_on_with(
    run: SmallRun, tmp_path: Path, listed: Callable[..., Path]
) -> None:
    shutil.rmtree(run.path / "images")
    pairs = run.artifact("pairs")
    workshop = run.begin_images("images", pairs)
    for shard in (1, 2):
        commit_images(workshop, pairs, shard)
    taken = take_down(run.folder, "domains", listed("secret.org"))
    assert taken["artifacts"]["images"] == {"rows": 0, "shards": 0, "in_the_making": 2}
    amended = run.artifact("pairs")
    continued = run.begin_images("images", amended)
    assert (continued.revision, continued.committed()) == (2, {1, 2})
    for shard in (0, 3):
        commit_images(continued, amended, shard)
    continued.publish(4)
    assert_equal(run, without(tmp_path, SECRETS))


def test_a_retry_that_is_half_done_is_gone_on_with(run: SmallRun, listed: Callable[..., Path]) -> None:
    pairs = run.artifact("pairs")
    workshop = run.begin_images("images", pairs, amends={"retry": ["fetch_failed"], "revision": 1})
    commit_images(workshop, pairs, 3)
    commit_images(workshop, pairs, 0)
    take_down(run.folder, "domains", listed("secret.org"))
    assert run.artifact("images").manifest.revision == 3
    again = run.begin_images("images", run.artifact("pairs"), amends={"retry": ["fetch_failed"], "revision": 3})
    assert (again.revision, again.committed()) == (4, {0, 3})
    receipt = again.receipt(3)
    assert isinstance(receipt, Receipt) and receipt.counts["removed"] == 2


def test_images_that_had_not_followed_their_pairs_stay_stale(run: SmallRun, listed: Callable[..., Path]) -> None:
    shutil.rmtree(run.path / "pairs")
    run.build_pairs("pairs", [*reversed(ROWS[:5]), *ROWS[5:]])
    old = run.artifact("images")
    take_down(run.folder, "domains", listed("secret.org"))
    new = run.artifact("images")
    assert new.manifest.totals["counts"]["removed"] == 4
    assert new.manifest.inputs == old.manifest.inputs != {"pairs": run.artifact("pairs").content_digest}
    pairs = run.artifact("pairs")
    follows = [entry.made_from == digest([pairs.shards[entry.shard].sha256]) for entry in new.shards]
    assert follows == [False, True, True, True], "only the shard whose rows differ is to be fetched again"


@pytest.mark.parametrize(
    ("kind", "lines", "told"),
    [
        ("urls", ["", "# only a comment"], "names nothing"),
        ("domains", ["a.org", "http://b.org/x"], "line 2 is 'http://b.org/x': expected a domain"),
        ("image_hashes", ["ab"], "line 1 is 'ab': expected 64 hexadecimal digits"),
        ("pairs", ["g" * 32], "expected 32 hexadecimal digits"),
    ],
)
def test_a_wrong_list_is_refused_with_its_line(
    run: SmallRun, listed: Callable[..., Path], kind: Any, lines: list[str], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        take_down(run.folder, kind, listed(*lines))


def test_a_run_without_pairs_and_a_folder_that_is_no_run_are_refused(
    run: SmallRun, tmp_path: Path, listed: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match="is not a run"):
        take_down(Folder(tmp_path / "nothing"), "urls", listed("http://a/"))
    (run.path / "pairs" / "manifest.json").unlink()
    with pytest.raises(UserError, match="--until pairs"):
        take_down(run.folder, "urls", listed("http://a/"))


def test_another_driver_at_work_is_left_alone(run: SmallRun, listed: Callable[..., Path]) -> None:
    with Lease(run.folder), pytest.raises(LeaseHeld):
        take_down(run.folder, "domains", listed("secret.org"))
    assert not (run.path / "removed.parquet").exists()


@pytest.mark.slow
def test_sigkill_before_any_write_loses_neither_the_removal_nor_a_row(
    run: SmallRun, tmp_path: Path, listed: Callable[..., Path]
) -> None:
    """Killed before every fifth of its writes, from one of the first five on; then finished by a run or by itself."""
    first = random.randrange(STEP)
    print(f"first kill before write {first}")
    path = listed("secret.org")
    run.build_model("prior")
    workshop = run.begin_images("images", run.artifact("pairs"), amends={"retry": ["fetch_failed"], "revision": 1})
    for shard in (0, 3):
        commit_images(workshop, run.artifact("pairs"), shard)
    for number in range(first, COPIES, STEP):
        shutil.copytree(run.path, f"{run.path}-{number}")
    script = Path(__file__).with_name("kill_each_write.py")
    done = subprocess.run(
        [sys.executable, str(script), str(run.path), str(path), str(first), str(STEP)],
        capture_output=True,
        text=True,
        check=True,
    )
    came_through = int(done.stdout)
    assert 60 < came_through < COPIES, "it wrote that often"
    reference = without(tmp_path, SECRETS)
    begun = 0
    for number in range(first, came_through, STEP):
        killed = SmallRun(Path(f"{run.path}-{number}"), ROWS, EVALUATION)
        if pending_takedown(killed.folder) is not None:
            begun += 1
            if begun % 2:
                with Lease(killed.folder) as lease:
                    finish_takedown(killed.folder, lease)
        take_down(killed.folder, "domains", path, purge=True)
        assert_equal(killed, reference)
        assert not [path for path in killed.path.rglob("*") if path.is_file() and holds_a_secret(path)]
        assert pending_takedown(killed.folder) is None
        record = json.loads((killed.path / "takedowns" / "1.json").read_text())
        assert (record["was_ok"], [model["model"] for model in record["models"]]) == (3, ["prior", "prior"])
        pairs, revision = killed.artifact("pairs"), killed.artifact("images").manifest.revision
        again = killed.begin_images("images", pairs, amends={"retry": ["fetch_failed"], "revision": revision})
        assert again.committed() == {0, 3}, "what the retry had done is done"
        inherit = {shard: killed.artifact("images").shards[shard] for shard in (1, 2)}
        assert list(find_faults(again.publish(4, inherit=inherit))) == []
    assert begun > 8


def test_the_command_says_what_left_who_saw_it_and_what_is_left_to_do(
    run: SmallRun, unclip: Any, listed: Callable[..., Path]
) -> None:
    run.build_model("prior")
    done = unclip("takedown", str(run.path), "--domains", str(listed("secret.org")))
    assert done.returncode == 0, done.stderr
    for told in (
        "takedown 1, 1 domains, 5 pairs",
        "removed from images: 4 rows in 2 shards",
        "prior revision 1: ",
        "prior step 400: ",
        "STILL HOLD these rows",
        "unclip gc",
    ):
        assert told in done.stdout, told
    again = unclip("takedown", str(run.path), "--domains", str(listed("elsewhere.org")))
    assert again.returncode == 0 and "none of the 1 domains matches a row" in again.stdout
    plain = unclip("takedown", str(run.path), "--urls", str(listed("http://c.org/1.jpg")), "--purge", "--json")
    assert json.loads(plain.stdout)["purged"]["images"]["files"] > 0
    both = unclip("takedown", str(run.path), "--urls", "a", "--pairs", "b")
    assert both.returncode == 2 and "takedown takes one list" in both.stderr
