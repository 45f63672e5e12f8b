"""`pairs`: the source's rows, identified, exact duplicates marked, dealt into shards of equal size.

Shard k of every later artifact is shard k of this one. Of exact duplicates the first by source position stays; the
others are rows too, so that every row of the source can be accounted for.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from cluster.parquet import write_table
from cluster.workshop import Workshop
from ingest.ledger import PAIRS_SCHEMA, Mark
from ingest.sources import Source


def pair_id(url: bytes | None, caption: bytes | None) -> bytes:
    """128 bits of sha256 over both values, each with a null flag and its length: no two pairs are spelled alike."""
    digest = hashlib.sha256()
    for value in (url, caption):
        if value is None:
            digest.update(b"\0")
        else:
            digest.update(b"\1" + len(value).to_bytes(8, "big") + value)
    return digest.digest()[:16]


def build_pairs(
    source: Source, workshop: Workshop, *, shard_rows: int, report: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, int]:
    """Commit every shard of `pairs` that has no receipt yet. → rows, shards, duplicates of the whole table.

    Duplicates are found with one set of 16-byte ids in memory: about 100 bytes a distinct pair.
    """
    committed = workshop.committed()
    rows = duplicates = shard = 0
    for table in _shards(source, shard_rows):
        marked = sum(mark == Mark.DUPLICATE for mark in table["mark"].to_pylist())
        if shard not in committed:
            started = time.monotonic()
            with workshop.attempt(shard) as attempt:
                write_table(attempt.path(f"{shard:08d}.parquet"), table)
                counts = {"unique": table.num_rows - marked, "duplicate": marked}
                attempt.commit(rows=table.num_rows, counts=counts, stats={"seconds": time.monotonic() - started})
        rows, duplicates, shard = rows + table.num_rows, duplicates + marked, shard + 1
        report({"shards": shard, "rows": rows, "duplicates": duplicates})
    return {"rows": rows, "shards": shard, "duplicates": duplicates}


def _shards(source: Source, shard_rows: int) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    waiting_rows = 0
    for table in _identified(source):
        waiting.append(table)
        waiting_rows += table.num_rows
        while waiting_rows >= shard_rows:
            joined = pa.concat_tables(waiting)
            yield joined.slice(0, shard_rows).combine_chunks()
            waiting, waiting_rows = [joined.slice(shard_rows)], waiting_rows - shard_rows
    if waiting_rows:
        yield pa.concat_tables(waiting).combine_chunks()


def _identified(source: Source) -> Iterator[pa.Table]:
    seen: set[bytes] = set()
    for batch in source.batches():
        ids, duplicate = [], []
        for url, caption in zip(batch.urls, batch.captions, strict=True):
            identity = pair_id(url, caption)
            duplicate.append(identity in seen)
            seen.add(identity)
            ids.append(identity)
        url_text, url_bytes = _text_or_bytes(batch.urls)
        caption_text, caption_bytes = _text_or_bytes(batch.captions)
        yield pa.table(
            {
                "source_file": [batch.source_file] * len(ids),
                "source_row": range(batch.first_row, batch.first_row + len(ids)),
                "pair_id": ids,
                "url": url_text,
                "caption": caption_text,
                "url_bytes": url_bytes,
                "caption_bytes": caption_bytes,
                "mark": [Mark.DUPLICATE if again else None for again in duplicate],
                "stored_offset": [None] * len(ids),
                "stored_length": [None] * len(ids),
            },
            schema=PAIRS_SCHEMA,
        )


def _text_or_bytes(values: list[bytes | None]) -> tuple[list[str | None], list[bytes | None]]:
    """Each value in exactly one of two columns: as text where it is UTF-8, else as its bytes."""
    texts: list[str | None] = []
    raw: list[bytes | None] = []
    for value in values:
        try:
            texts.append(None if value is None else value.decode("utf-8"))
            raw.append(None)
        except UnicodeDecodeError:
            texts.append(None)
            raw.append(value)
    return texts, raw
