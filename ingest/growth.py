"""A later snapshot of the source: its new pairs become new shards, and the old shards stay as they are.

    new        its pair_id is in no row of the base that is not removed, nor among the tombstones
    vanished   a row of the base whose pair_id is in no row of the snapshot

Both come from one external sort over the ids of both sides. Of each id, the sort brings first a token for a row of the
snapshot, then the rows of the base, then the rows of the snapshot, so that every row is judged by what came before it.
A caption that changed is a new pair, and its old one has vanished. The last old shard is not filled up.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.artifact import Artifact, ShardEntry
from cluster.parquet import write_table
from cluster.shards import ChosenShards
from cluster.workshop import Workshop
from ingest.arrangement import Arrangement, hash_rows
from ingest.external_sort import Ahead, SortedRuns
from ingest.identities import IdentityFile, Ids, IdSet, id_column, id_numbers
from ingest.ledger import PAIRS_SCHEMA, TEXT_COLUMNS, Mark
from ingest.partition import Report, deal, mark_counts
from ingest.scratch import scratch_folder
from ingest.sources import Source

VANISHED = "vanished.parquet"
_ERASED = (*(column.name for column in TEXT_COLUMNS), "stored_offset", "stored_length")
_VANISHED_SCHEMA = pa.schema([("pair_id", pa.binary(16)), ("shard", pa.int64()), ("row", pa.int64())])
_TOKEN, _BASE, _SNAPSHOT = 0, 1, 2
_IDS_AT_ONCE = 1 << 17


@dataclass(frozen=True)
class Growth:
    """What a snapshot changed. Publish with `publish(growth.shards, inherit=growth.inherited)`."""

    snapshot_rows: int
    new_rows: int
    new_duplicates: int
    vanished_rows: int
    pruned_rows: int
    changed_shards: tuple[int, ...]
    new_shards: tuple[int, ...]
    inherited: ChosenShards

    @property
    def shards(self) -> int:
        return len(self.inherited) + len(self.changed_shards) + len(self.new_shards)

    def summary(self) -> str:
        """One line for a person."""
        vanished = f"{self.vanished_rows:,} vanished from the source"
        if self.vanished_rows:
            vanished += " and are removed" if self.pruned_rows else f" and are kept ({VANISHED} lists them)"
        return f"{self.new_rows:,} new pairs in {len(self.new_shards):,} shards; {vanished}"


def grow_pairs(
    base: Artifact,
    source: Source,
    workshop: Workshop,
    *,
    shard_rows: int,
    removed: pa.Array | pa.ChunkedArray | None = None,
    prune: bool = False,
    report: Report = lambda _: None,
) -> Growth:
    """Commit the snapshot's new pairs as shards after those of `base`; `prune` also rewrites shards with vanished rows.

    The vanished rows are listed in `vanished.parquet` in the workshop's work folder: pair_id, shard, row.
    """
    with scratch_folder(workshop, "growth") as scratch, IdentityFile(scratch / "ids") as ids:
        snapshot_rows = hash_rows(source, ids, report)
        tombstones = IdSet(removed)
        new = SortedRuns(scratch, "new", ("row",))
        vanished = SortedRuns(scratch, "vanished", ("shard", "row"))
        for table in _judged(_both_sides(base, ids, tombstones, scratch)):
            new.add(table.filter(table["shard"].to_numpy() < 0).select(["row"]))
            vanished.add(table.filter(table["shard"].to_numpy() >= 0))
        _list_vanished(vanished, workshop, scratch)
        changed = _prune(base, vanished, workshop) if prune else []
        first_shard = base.shard_count
        arrangement = Arrangement(source, scratch, ids, tombstones, new)
        dealt = deal(arrangement.tables(), workshop, shard_rows=shard_rows, first_shard=first_shard, report=report)
    return Growth(
        snapshot_rows=snapshot_rows,
        new_rows=dealt["rows"],
        new_duplicates=dealt["duplicates"],
        vanished_rows=vanished.rows,
        pruned_rows=vanished.rows if prune else 0,
        changed_shards=tuple(changed),
        new_shards=tuple(range(first_shard, first_shard + dealt["shards"])),
        inherited=ChosenShards(base.shards, set(range(base.shard_count)).difference(changed)),
    )


def _both_sides(base: Artifact, ids: IdentityFile, tombstones: IdSet, scratch: Path) -> SortedRuns:
    sides = SortedRuns(scratch, "sides", ("high", "low", "side", "shard", "row"))
    row = 0
    ids.rewind()
    while len(some := ids.read(_IDS_AT_ONCE)):
        pairs, rows = some[:, 2:], np.arange(row, row + len(some))
        row += len(some)
        sides.add(_side(_TOKEN, pairs, -1, rows))
        # What was taken down stays away, whatever a snapshot says; its token keeps it from being called vanished.
        stays = ~tombstones.contains(pairs)
        sides.add(_side(_SNAPSHOT, pairs[stays], -1, rows[stays]))
    for entry in base.shards:
        table = _read(base, entry, ["pair_id", "mark"])
        there = pc.fill_null(pc.not_equal(table["mark"], str(Mark.REMOVED)), True).to_numpy()
        pairs = id_numbers(table["pair_id"])
        sides.add(_side(_BASE, pairs[there], entry.shard, np.flatnonzero(there)))
    return sides


def _side(side: int, pairs: Ids, shard: int, rows: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> pa.Table:
    return pa.table(
        {
            "high": np.ascontiguousarray(pairs[:, 0]),
            "low": np.ascontiguousarray(pairs[:, 1]),
            "side": np.full(len(rows), side, np.int8),
            "shard": np.full(len(rows), shard, np.int64),
            "row": rows,
        }
    )


def _judged(sides: SortedRuns) -> Iterator[pa.Table]:
    """The rows of the snapshot that are new (`shard` is -1) and the rows of the base that have vanished."""
    last, last_seen = None, 0
    for table in sides.sorted():
        high, low, side = (table[name].to_numpy() for name in ("high", "low", "side"))
        starts = np.ones(len(high), bool)
        starts[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        starts[0] = last != (int(high[0]), int(low[0]))
        # Which sides an id has, of what is at hand; an id that began in the table before brings what it had there.
        begins = np.unique(np.concatenate(([0], np.flatnonzero(starts))))
        seen = np.bitwise_or.reduceat(1 << side.astype(np.int64), begins)
        if not starts[0]:
            seen[0] |= last_seen
        last, last_seen = (int(high[-1]), int(low[-1])), int(seen[-1])
        seen = seen[np.searchsorted(begins, np.arange(len(high)), "right") - 1]
        new = (side == _SNAPSHOT) & (seen & (1 << _BASE) == 0)
        vanished = (side == _BASE) & (seen & (1 << _TOKEN) == 0)
        yield table.filter(pa.array(new | vanished))


def _list_vanished(vanished: SortedRuns, workshop: Workshop, scratch: Path) -> None:
    path = scratch / VANISHED
    with pq.ParquetWriter(path, _VANISHED_SCHEMA, compression="zstd") as writer:
        for table in vanished.sorted():
            ids = np.stack([table["high"].to_numpy(), table["low"].to_numpy()], axis=1)
            writer.write_table(pa.table([id_column(ids), table["shard"], table["row"]], schema=_VANISHED_SCHEMA))
    workshop.work.make()
    workshop.work.upload(path, VANISHED)


def _prune(base: Artifact, vanished: SortedRuns, workshop: Workshop) -> list[int]:
    """Rewrite the shards of the base that have vanished rows. → their numbers."""
    ahead = Ahead(vanished.sorted(), "shard")
    committed = workshop.committed()
    changed = []
    for entry in base.shards:
        found = ahead.below(entry.shard + 1)
        if found is None:
            continue
        changed.append(entry.shard)
        if entry.shard in committed:
            continue
        table = erased(_read(base, entry, PAIRS_SCHEMA.names), found["row"].to_numpy())
        with workshop.attempt(entry.shard) as attempt:
            write_table(attempt.path(entry.files[0].name), table)
            attempt.commit(rows=table.num_rows, counts=mark_counts(table))
    return changed


def erased(table: pa.Table, rows: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> pa.Table:
    """A shard of pairs with some rows removed: they keep their place and id, and nothing else."""
    gone = np.zeros(table.num_rows, bool)
    gone[rows] = True
    keep = pa.array(~gone)
    for column in (*_ERASED, "mark"):
        value = pa.scalar(str(Mark.REMOVED) if column == "mark" else None, table.schema.field(column).type)
        index = table.column_names.index(column)
        table = table.set_column(index, table.schema.field(column), pc.if_else(keep, table[column], value))
    return table.combine_chunks()


def _read(base: Artifact, entry: ShardEntry, columns: list[str]) -> pa.Table:
    # Opened where it lies: `base.file` would keep a copy of every shard of a remote base on this machine.
    with base.folder.open(entry.files[0].stored_as) as file:
        return pq.ParquetFile(file, pre_buffer=False).read(columns, use_threads=False)
