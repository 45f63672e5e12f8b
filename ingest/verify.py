"""Is an `images` artifact true to its pairs and to itself? Every row accounted for, every picture in its place."""

import hashlib
import tarfile
from collections import Counter
from collections.abc import Iterator

import pyarrow.parquet as pq

from cluster.artifact import Artifact, ShardEntry
from ingest.ledger import LEDGER_SCHEMA
from ingest.outcome import Status

STATUSES = frozenset(Status)


def find_image_faults(images: Artifact, pairs: Artifact) -> Iterator[str]:
    """One sentence a fault: the ledger against the pairs, the counts against the ledger, the tar against the ledger."""
    if images.shard_count != pairs.shard_count:
        yield f"images has {images.shard_count} shards, pairs has {pairs.shard_count}"
    for entry, of_pairs in zip(images.shards, pairs.shards, strict=False):
        yield from _faults_of_shard(images, entry, pairs, of_pairs)


def _faults_of_shard(images: Artifact, entry: ShardEntry, pairs: Artifact, of_pairs: ShardEntry) -> Iterator[str]:
    name = f"{entry.shard:08d}"
    ledger = pq.read_table(images.file(f"{name}.parquet"))
    if not ledger.schema.equals(LEDGER_SCHEMA):
        yield f"{name}.parquet: its columns are not a ledger's"
        return
    asked = pq.read_table(pairs.file(f"{name}.parquet"), columns=["source_file", "source_row", "pair_id"])
    if ledger.select(["source_file", "source_row", "pair_id"]).to_pylist() != asked.to_pylist():
        yield f"{name}.parquet: {ledger.num_rows} rows that are not, in order, the {of_pairs.rows} of its pairs shard"
    rows = ledger.select(["key", "status", "stored_sha256", "offset", "length"]).to_pylist()
    counted = Counter(row["status"] for row in rows)
    if unknown := sorted(counted.keys() - STATUSES):
        yield f"{name}.parquet: {unknown[0]!r} is no state that a row can end in"
    if dict(counted) != {status: count for status, count in entry.counts.items() if count}:
        yield f"{name}.parquet: its rows by state are {dict(counted)}; the receipt says {entry.counts}"
    kept = [row for row in rows if row["status"] == Status.OK]
    path = images.file(f"{name}.tar")
    with tarfile.open(path) as tar:
        members = [member.name.rpartition(".") for member in tar]
    pictures = [stem for stem, _, extension in members if extension not in ("txt", "json")]
    if pictures != [row["key"] for row in kept]:
        yield f"{name}.tar: its {len(pictures)} pictures are not, in order, the {len(kept)} ok rows of the ledger"
    with open(path, "rb") as file:
        for row in kept:
            file.seek(row["offset"])
            if hashlib.sha256(file.read(row["length"])).hexdigest() != row["stored_sha256"]:
                yield f"{name}.tar: the bytes of {row['key']} are not those that the ledger names"
