"""`pairs`: the source's rows, identified, marked, arranged, and dealt into shards of equal size.

Shard k of every later artifact is shard k of this one. Of exact duplicates the first by source position stays; the
others are rows too, so that every row of the source can be accounted for. Rows of one URL stand together, at the place
of the first, so that one URL with many captions is fetched once. Memory does not grow with the table.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from cluster.parquet import write_table
from cluster.workshop import Workshop
from ingest.arrangement import Arrangement, hash_rows
from ingest.identities import IdentityFile, IdSet, pair_id
from ingest.ledger import Mark
from ingest.scratch import scratch_folder
from ingest.sources import Source

__all__ = ["build_pairs", "deal", "pair_id"]

Report = Callable[[dict[str, Any]], None]


def build_pairs(
    source: Source,
    workshop: Workshop,
    *,
    shard_rows: int,
    removed: pa.Array | pa.ChunkedArray | None = None,
    report: Report = lambda _: None,
) -> dict[str, int]:
    """Commit every shard of `pairs` that has no receipt yet. → rows, shards, duplicates, removed of the whole table.

    `removed` are the tombstones: pair ids, binary(16), whose rows are marked and left without values. The source is
    read twice, or three times where rows of one URL stand apart.
    """
    with scratch_folder(workshop, "arrangement") as scratch, IdentityFile(scratch / "ids") as ids:
        hash_rows(source, ids, report)
        arrangement = Arrangement(source, scratch, ids, IdSet(removed))
        return deal(arrangement.tables(), workshop, shard_rows=shard_rows, report=report)


def deal(
    tables: Iterator[pa.Table], workshop: Workshop, *, shard_rows: int, first_shard: int = 0, report: Report
) -> dict[str, int]:
    """Commit the rows as shards from `first_shard` on. → rows, shards, duplicates, removed of what was dealt."""
    committed = workshop.committed()
    totals = {"rows": 0, "shards": 0, "duplicates": 0, "removed": 0}
    for table in _shards(tables, shard_rows):
        shard = first_shard + totals["shards"]
        counts = mark_counts(table)
        if shard not in committed:
            started = time.monotonic()
            with workshop.attempt(shard) as attempt:
                write_table(attempt.path(f"{shard:08d}.parquet"), table)
                attempt.commit(rows=table.num_rows, counts=counts, stats={"seconds": time.monotonic() - started})
        totals["rows"] += table.num_rows
        totals["shards"] += 1
        totals["duplicates"] += counts["duplicate"]
        totals["removed"] += counts["removed"]
        report(dict(totals))
    return totals


def mark_counts(table: pa.Table) -> dict[str, int]:
    """A shard's counts, as its receipt has them."""
    marks = table["mark"].combine_chunks().value_counts().to_pylist()
    counts = {row["values"]: int(row["counts"]) for row in marks}
    duplicate, removed = counts.get(Mark.DUPLICATE, 0), counts.get(Mark.REMOVED, 0)
    return {"unique": table.num_rows - duplicate - removed, "duplicate": duplicate, "removed": removed}


def _shards(tables: Iterator[pa.Table], shard_rows: int) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    waiting_rows = 0
    for table in tables:
        waiting.append(table)
        waiting_rows += table.num_rows
        if waiting_rows < shard_rows:
            continue
        joined = pa.concat_tables(waiting)
        whole = waiting_rows - waiting_rows % shard_rows
        for start in range(0, whole, shard_rows):
            yield joined.slice(start, shard_rows).combine_chunks()
        # A copy, so that the rest does not hold on to all of its batch.
        waiting = [joined.slice(whole).combine_chunks()]
        waiting_rows -= whole
    if waiting_rows:
        yield pa.concat_tables(waiting).combine_chunks()
