"""A shard without the removed rows: what is kept is kept to the byte, what is gone is gone."""

import hashlib
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.artifact import Request
from cluster.errors import WorkFailed
from cluster.storage import Folder
from cluster.workshop import Workshop, begin
from ingest.ledger import LEDGER_SCHEMA, PAIRS_SCHEMA, Mark, ledger_table, row_key
from ingest.outcome import Outcome, Status
from ingest.removal import (
    ShardFiles,
    Tombstones,
    add_tombstones,
    is_made_of,
    read_tombstones,
    removed_pairs,
    write_images_without,
    write_pairs_without,
)
from ingest.tar import DeterministicTar

ROWS = 12
ENDED = ["ok", "ok", "fetch_failed", "duplicate", "undecodable", "ok"] * 2


def pair_id(row: int) -> bytes:
    return hashlib.md5(str(row - 1 if ENDED[row] == "duplicate" else row).encode()).digest()


def tombstones(*rows: int) -> Tombstones:
    return Tombstones(pa.array(sorted({pair_id(row) for row in rows}), pa.binary(16)), 1)


def shard(folder: Path) -> tuple[ShardFiles, ShardFiles]:
    """A shard of pairs and one of images, of twelve rows that ended in every way."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [
        {"source_file": "t", "source_row": row, "pair_id": pair_id(row), "url": f"http://h{row}.org/x",
         "caption": f"caption {row}", "stored_offset": 512 * row, "stored_length": row,
         "mark": Mark.DUPLICATE if ENDED[row] == "duplicate" else None}
        for row in range(ROWS)
    ]  # fmt: skip
    table = pa.Table.from_pylist(pairs, PAIRS_SCHEMA)
    keys = [row_key(0, row, ROWS) for row in range(ROWS)]
    outcomes: list[Outcome | None] = []
    with (folder / "0.tar").open("wb") as file, DeterministicTar(file) as tar:
        for row, key in enumerate(keys):
            status = Status(ENDED[row])
            if status is Status.OK:
                data = f"picture {row}".encode() * (row + 1) * 50
                offset = tar.add(f"{key}.jpg", data)
                tar.add(f"{key}.txt", f"caption {row}".encode())
                tar.add(f"{key}.json", b"{}")
                stored = hashlib.sha256(data).hexdigest()
                outcomes.append(Outcome(status, None, "ab" * 32, stored, 8, 8, 9, 9, offset, len(data)))
            else:
                outcomes.append(Outcome(status, None if status is Status.DUPLICATE else "why"))
    pq.write_table(table, folder / "pairs.parquet")
    pq.write_table(ledger_table(table, keys, outcomes), folder / "0.parquet")
    stats = {"seconds": 2.0, "failing_hosts": {"h2.org": 1, "h8.org": 1}, "reasons": {"fetch_failed/why": 2}}
    return ShardFiles(0, folder / "pairs.parquet", None, {}), ShardFiles(
        0, folder / "0.parquet", folder / "0.tar", stats
    )


def workshop(folder: Path, kind: str) -> Workshop:
    return begin(Folder(folder / kind), Request(kind, 1, {}, {}), {})


def without(folder: Path, *rows: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, bytes], Workshop]:
    """Rows of pairs and ledger, and the members of the tar, once the rows are removed."""
    pairs, images = shard(folder)
    shops = workshop(folder, "pairs"), workshop(folder, "images")
    with shops[0].attempt(0) as attempt:
        write_pairs_without(pairs, tombstones(*rows), attempt, "")
    with shops[1].attempt(0) as attempt:
        write_images_without(images, tombstones(*rows), attempt, "made of it")
    tables = [pq.read_table(shop.folder.local_path("00000000.parquet")) for shop in shops]
    assert tables[0].schema.equals(PAIRS_SCHEMA) and tables[1].schema.equals(LEDGER_SCHEMA)
    with tarfile.open(shops[1].folder.local_path("00000000.tar")) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    return tables[0].to_pylist(), tables[1].to_pylist(), members, shops[1]


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, ROWS - 1)))
def test_kept_rows_stay_and_removed_ones_keep_their_identity_alone(
    tmp_path_factory: pytest.TempPathFactory, removed: set[int]
) -> None:
    folder = tmp_path_factory.mktemp("shard")
    pairs, ledger, members, shop = without(folder, *removed)
    gone = {row for row in range(ROWS) if pair_id(row) in {pair_id(other) for other in removed}}
    before = pq.read_table(folder / "0.parquet").to_pylist()
    with tarfile.open(folder / "0.tar") as tar:
        old = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    kept_keys = {row["key"] for number, row in enumerate(before) if number not in gone}
    assert members == {name: data for name, data in old.items() if name.partition(".")[0] in kept_keys}
    data = shop.folder.local_path("00000000.tar").read_bytes()
    for row in range(ROWS):
        if row in gone:
            kept = {name for name, value in ledger[row].items() if value is not None}
            assert kept == {"source_file", "source_row", "pair_id", "key", "status"}
            assert (ledger[row]["status"], pairs[row]["mark"]) == ("removed", "removed")
            kept = {name for name, value in pairs[row].items() if value is not None}
            assert kept == {"source_file", "source_row", "pair_id", "mark"}
            continue
        assert {**ledger[row], "offset": 0} == {**before[row], "offset": 0}
        if ledger[row]["status"] == "ok":
            picture = data[ledger[row]["offset"] : ledger[row]["offset"] + ledger[row]["length"]]
            assert hashlib.sha256(picture).hexdigest() == ledger[row]["stored_sha256"]
    receipt = shop.receipt(0)
    assert receipt is not None and sum(receipt.counts.values()) == ROWS and receipt.made_from == "made of it"


def test_the_receipt_forgets_reasons_and_hosts_of_removed_rows(tmp_path: Path) -> None:
    receipt = without(tmp_path, 2)[3].receipt(0)
    assert receipt is not None
    assert receipt.stats["failing_hosts"] == {"h8.org": 1}
    assert receipt.stats["reasons"] == {"fetch_failed/why": 1, "undecodable/why": 2}
    assert receipt.stats["seconds"] == 2.0


def test_a_tar_that_lacks_a_picture_is_not_rewritten(tmp_path: Path) -> None:
    _, images = shard(tmp_path)
    with (tmp_path / "0.tar").open("wb") as file, DeterministicTar(file):
        pass
    with pytest.raises(WorkFailed, match="lacks the pictures of 4 ok rows"):
        with workshop(tmp_path, "images").attempt(0) as attempt:
            write_images_without(images, tombstones(0, 1, 2), attempt, "")


def test_a_ledger_is_known_by_the_rows_and_marks_of_its_pairs(tmp_path: Path) -> None:
    pairs_files, images_files = shard(tmp_path)
    pairs, ledger = pq.read_table(pairs_files.table), pq.read_table(images_files.table)
    none = Tombstones(pa.array([], pa.binary(16)))
    assert is_made_of(ledger, pairs, none)
    marks = pairs["mark"].to_pylist()
    amended = pairs.set_column(7, PAIRS_SCHEMA.field("mark"), pa.array([Mark.REMOVED, *marks[1:]], pa.string()))
    assert not is_made_of(ledger, amended, none), "the pairs have lost a row that the ledger still has"
    assert is_made_of(ledger, amended, tombstones(0)), "which it is about to lose too"
    assert not is_made_of(ledger, pairs.slice(1), none)
    assert not is_made_of(ledger, pairs.take(list(reversed(range(ROWS)))), none)


def test_tombstones_are_sorted_unique_and_add_up(tmp_path: Path) -> None:
    run = Folder(tmp_path)
    assert len(removed_pairs(run)) == 0
    add_tombstones(run, [b"b" * 16, b"a" * 16], 1)
    add_tombstones(run, [b"a" * 16, b"c" * 16], 2)
    found = read_tombstones(run)
    assert found.pair_ids.to_pylist() == [b"a" * 16, b"b" * 16, b"c" * 16] and found.takedown == 2
    assert removed_pairs(run).type == pa.binary(16)
    table = pa.table({"pair_id": pa.array([b"c" * 16, b"d" * 16], pa.binary(16))})
    assert found.rows(table["pair_id"]).tolist() == [True, False]
