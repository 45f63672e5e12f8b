"""Taking rows out of what is published: tombstones, and the shards of pairs and images without the removed rows.

    <run>/removed.parquet     pair_id, sorted, each once: the tombstones. Nothing else of a removed row is kept
                              (metadata `takedown`: number of the takedown that wrote it last)

A removed row stays a row: `source_file`, `source_row`, `pair_id` and `key` are as they were. In the pairs its mark is
`removed`; in the ledger its status is, and what it held (url, caption, hashes, sizes, place) is null; its members are
not in the tar. The bytes are those that a build from the pairs with these marks would have written.
"""

import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.errors import WorkFailed
from cluster.parquet import write_table
from cluster.storage import Folder
from cluster.workshop import Attempt
from ingest.ledger import LEDGER_SCHEMA, PAIR_COLUMNS, Mark
from ingest.outcome import Status
from ingest.tar import DeterministicTar

TOMBSTONES_FILE = "removed.parquet"
PAIR_ID = pa.binary(16)
KEPT_COLUMNS = frozenset({*(column.name for column in PAIR_COLUMNS), "key"})
_TAKEDOWN = b"takedown"
_DESCRIBES = frozenset({"txt", "json"})


@dataclass(frozen=True)
class Tombstones:
    """The removed pairs of a run: their ids (sorted, each once), and the takedown that added to them last."""

    pair_ids: pa.Array
    takedown: int = 0

    def rows(self, pair_ids: pa.ChunkedArray) -> NDArray[np.bool_]:
        """Which of these rows are removed."""
        return np.asarray(pc.is_in(pair_ids, value_set=self.pair_ids), dtype=np.bool_)


def read_tombstones(run: Folder) -> Tombstones:
    """The tombstones of a run; none where nothing was ever removed."""
    if not run.exists(TOMBSTONES_FILE):
        return Tombstones(pa.array([], PAIR_ID))
    table = pq.ParquetFile(pa.BufferReader(run.read(TOMBSTONES_FILE)), pre_buffer=False).read(use_threads=False)
    takedown = int((table.schema.metadata or {}).get(_TAKEDOWN, b"0"))
    return Tombstones(table["pair_id"].combine_chunks(), takedown)


def removed_pairs(run: Folder) -> pa.Array:
    """Ids of the removed pairs of a run, for an ingest to leave them out: binary(16), sorted, each once."""
    return read_tombstones(run).pair_ids


def add_tombstones(run: Folder, pair_ids: Iterable[bytes], takedown: int) -> Tombstones:
    """Add pairs to the tombstones of a run, in one atomic replacement."""
    ids = sorted({*read_tombstones(run).pair_ids.to_pylist(), *pair_ids})
    tombstones = Tombstones(pa.array(ids, PAIR_ID), takedown)
    schema = pa.schema([pa.field("pair_id", PAIR_ID, nullable=False)], metadata={_TAKEDOWN: str(takedown)})
    with tempfile.TemporaryDirectory(prefix="unclip-") as scratch:
        path = Path(scratch) / TOMBSTONES_FILE
        write_table(path, pa.table([tombstones.pair_ids], schema=schema))
        run.write(TOMBSTONES_FILE, path.read_bytes())
    return tombstones


@dataclass(frozen=True)
class ShardFiles:
    """A shard as it is now: its number, its files on this machine, and its receipt's statistics."""

    shard: int
    table: Path
    tar: Path | None
    stats: dict[str, Any]


def write_pairs_without(shard: ShardFiles, tombstones: Tombstones, attempt: Attempt, made_from: str) -> None:
    """Commit a shard of pairs with the removed rows marked and erased."""
    table = pq.read_table(shard.table)
    removed = tombstones.rows(table["pair_id"])
    erased = _erased(table, removed, {"mark": Mark.REMOVED})
    write_table(attempt.path(f"{shard.shard:08d}.parquet"), erased)
    marks = Counter(erased["mark"].to_pylist())
    counts = {"unique": marks[None], "duplicate": marks[Mark.DUPLICATE], "removed": marks[Mark.REMOVED]}
    attempt.commit(rows=table.num_rows, counts=counts, stats=shard.stats, made_from=made_from)


def write_images_without(shard: ShardFiles, tombstones: Tombstones, attempt: Attempt, made_from: str) -> None:
    """Commit a shard of images whose ledger and tar have nothing left of the removed rows but their `pair_id`."""
    assert shard.tar is not None, "a shard of images has a tar"
    ledger = pq.read_table(shard.table)
    removed = tombstones.rows(ledger["pair_id"])
    erased = _erased(ledger, removed, {"status": Status.REMOVED})
    kept = set(erased["key"].filter(pc.equal(erased["status"], Status.OK)).to_pylist())
    offsets = _copy_members(shard.tar, attempt.path(f"{shard.shard:08d}.tar"), kept)
    if offsets.keys() != kept:
        raise WorkFailed(f"{shard.tar} lacks the pictures of {len(kept - offsets.keys())} ok rows; run `unclip verify`")
    places = pa.array([offsets.get(key) for key in erased["key"].to_pylist()], pa.int64())
    erased = erased.set_column(erased.schema.get_field_index("offset"), LEDGER_SCHEMA.field("offset"), places)
    write_table(attempt.path(f"{shard.shard:08d}.parquet"), erased)
    statuses = erased["status"].to_pylist()
    ended = zip(statuses, erased["reason"].to_pylist(), strict=True)
    reasons = Counter(f"{status}/{reason}" for status, reason in ended if reason is not None)
    stats = shard.stats | {"reasons": dict(sorted(reasons.items()))}
    if "failing_hosts" in stats:
        stats["failing_hosts"] = _without_hosts(stats["failing_hosts"], ledger["url"].filter(pa.array(removed)))
    attempt.commit(rows=ledger.num_rows, counts=dict(Counter(statuses)), stats=stats, made_from=made_from)


def is_made_of(ledger: pa.Table, pairs: pa.Table, tombstones: Tombstones) -> bool:
    """Is this the ledger of a shard built from this shard of pairs, once the removed rows are out of both: the same
    rows, with the same marks?"""
    names = [column.name for column in PAIR_COLUMNS]
    if not ledger.select(names).equals(pairs.select(names)):
        return False
    marking = pa.array([Status.DUPLICATE, Status.REMOVED])
    status = pc.if_else(pc.is_in(ledger["status"], value_set=marking), ledger["status"], pa.scalar(None, pa.string()))
    removed = pa.array(tombstones.rows(pairs["pair_id"]))
    marks = (pc.if_else(removed, Mark.REMOVED, column) for column in (status, pairs["mark"]))
    return bool(next(marks).equals(next(marks)))


def _erased(table: pa.Table, removed: NDArray[np.bool_], said: dict[str, str]) -> pa.Table:
    """The table with the removed rows' values null, but for those that say which row it was, and that it is gone."""
    mask = pa.array(removed)
    columns = []
    for field, column in zip(table.schema, table.columns, strict=True):
        if field.name not in KEPT_COLUMNS:
            column = pc.if_else(mask, pa.scalar(said.get(field.name), field.type), column)
        columns.append(column)
    return pa.table(columns, schema=table.schema).combine_chunks()


def _copy_members(source: Path, target: Path, kept: set[str]) -> dict[str, int]:
    """The members of the kept keys, in their order. → key → where its picture's data begins."""
    offsets = {}
    with tarfile.open(source, "r:") as old, target.open("wb", buffering=1 << 20) as file, DeterministicTar(file) as new:
        for member in old:
            key, _, extension = member.name.rpartition(".")
            opened = old.extractfile(member)
            if key in kept and opened is not None:
                place = new.add(member.name, opened.read())
                if extension not in _DESCRIBES:
                    offsets[key] = place
    return offsets


def _without_hosts(hosts: dict[str, int], urls: pa.ChunkedArray) -> dict[str, int]:
    """A receipt's failing hosts without those that the removed rows name: a host may be what was to be forgotten."""
    gone = {host for url in urls.to_pylist() if url and (host := _host(url))}
    return {host: count for host, count in hosts.items() if host.lower() not in gone}


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
