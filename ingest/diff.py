"""What differs between two images artifacts, row by row, in bounded memory.

    shards of the same number and the same bytes          equal, not read
    shards of the same number with the same rows          compared as they stand
    the rest                                              dealt by `pair_id` over files on disk, joined file by file

A row is a `pair_id`, and of exact duplicates the first, the second … in the artifact's order. Where both artifacts have
rows that the other lacks, those are joined once more by URL: a caption that changed is a new pair.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.artifact import Artifact, ShardEntry
from ingest.outcome import Status
from ingest.spill import Spill

Plain = dict[str, Any]
EXAMPLES = 5
COLUMNS = ["pair_id", "key", "url", "caption", "status", "reason", "image_sha256", "stored_sha256"]
ROW = pa.schema([("pair_id", pa.binary(16)), *((name, pa.string()) for name in COLUMNS[1:])])
BUCKET_ROWS = 250_000
SIDES = ("a", "b")


@dataclass
class Difference:
    """What was found: counts, and a few examples of each kind."""

    rows: dict[str, int] = field(default_factory=lambda: {"a": 0, "b": 0, "both": 0, "only_a": 0, "only_b": 0})
    statuses: Counter[tuple[str, str]] = field(default_factory=Counter)
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Plain]] = field(default_factory=dict)

    def plain(self) -> Plain:
        return {
            "rows": self.rows,
            "statuses": [{"a": a, "b": b, "rows": count} for (a, b), count in sorted(self.statuses.items())],
            "reasons": [{"a": a, "b": b, "rows": count} for (a, b), count in self.reasons.most_common(40)],
            "changed": dict(sorted(self.changed.items())),
            "examples": self.examples,
        }


def diff_images(a: Artifact, b: Artifact) -> Difference:
    """Compare two images artifacts. Each row of either is counted once: in both, or on one side only."""
    found = Difference()
    found.rows |= {"a": a.rows, "b": b.rows}
    with tempfile.TemporaryDirectory(prefix="unclip-diff-") as folder:
        apart = {side: Spill(Path(folder) / side, "pair_id", ROW, _buckets(a, b)) for side in SIDES}
        only = {side: Spill(Path(folder) / f"only-{side}", "url", ROW, _buckets(a, b)) for side in SIDES}
        for of_a, of_b in zip(a.shards, b.shards, strict=False):
            if of_a.sha256 == of_b.sha256:
                _count_equal(found, of_a)
                continue
            left, right = _rows(a, of_a), _rows(b, of_b)
            if left["pair_id"].equals(right["pair_id"]):
                _compare(found, left, right)
            else:
                apart["a"].add(left)
                apart["b"].add(right)
        for side, artifact, other in (("a", a, b), ("b", b, a)):
            for entry in artifact.shards[other.shard_count :]:
                apart[side].add(_rows(artifact, entry))
        for left, right in zip(apart["a"].buckets(), apart["b"].buckets(), strict=True):
            _join(found, left, right, only)
        if only["a"].rows and only["b"].rows:
            for left, right in zip(only["a"].buckets(), only["b"].buckets(), strict=True):
                _recaptioned(found, left, right)
    return found


def _buckets(a: Artifact, b: Artifact) -> int:
    return min(1024, 1 + max(a.rows, b.rows) // BUCKET_ROWS)


def _rows(artifact: Artifact, entry: ShardEntry) -> pa.Table:
    stored_as = next(file.stored_as for file in entry.files if file.name.endswith(".parquet"))
    with artifact.folder.open(stored_as) as file:
        return pq.ParquetFile(file).read(COLUMNS, use_threads=False).cast(ROW)


def _count_equal(found: Difference, entry: ShardEntry) -> None:
    found.rows["both"] += entry.rows
    for status, count in entry.counts.items():
        if count:
            found.statuses[status, status] += count


def _compare(found: Difference, a: pa.Table, b: pa.Table) -> None:
    """Rows that stand side by side."""
    found.rows["both"] += a.num_rows
    _tally(found.statuses, a["status"], b["status"])
    ended = [pc.binary_join_element_wise(side["status"], pc.fill_null(side["reason"], ""), "/") for side in (a, b)]
    moved = _differ(ended[0], ended[1])
    _tally(found.reasons, *(pc.ascii_rtrim(side.filter(moved), "/") for side in ended))
    gone = pc.or_(pc.equal(a["status"], Status.REMOVED), pc.equal(b["status"], Status.REMOVED))
    there = pc.invert(gone)
    both_ok = pc.and_(pc.equal(a["status"], Status.OK), pc.equal(b["status"], Status.OK))
    kinds = {
        "status": _differ(a["status"], b["status"]),
        "reason": pc.and_(pc.equal(a["status"], b["status"]), moved),
        "removed": pc.and_(pc.equal(b["status"], Status.REMOVED), pc.not_equal(a["status"], Status.REMOVED)),
        "fetched_picture": pc.fill_null(pc.not_equal(a["image_sha256"], b["image_sha256"]), False),
        "stored_picture": pc.and_(both_ok, _differ(a["stored_sha256"], b["stored_sha256"])),
        "text": pc.and_(there, pc.or_(_differ(a["url"], b["url"]), _differ(a["caption"], b["caption"]))),
        "key": _differ(a["key"], b["key"]),
    }
    for kind, mask in kinds.items():
        count = int(pc.sum(mask).as_py() or 0)
        if count:
            found.changed[kind] += count
            _show(found, kind, a.filter(mask), b.filter(mask))


def _join(found: Difference, a: pa.Table, b: pa.Table, only: dict[str, Spill]) -> None:
    """Rows that stand in different places, or on one side only."""
    left, right = _numbered(a), _numbered(b)
    shared, at_a, at_b = np.intersect1d(left, right, assume_unique=True, return_indices=True)
    if len(shared):
        order = np.argsort(at_a)
        _compare(found, a.take(at_a[order]), b.take(at_b[order]))
    for side, table, at in (("a", a, at_a), ("b", b, at_b)):
        alone = np.ones(table.num_rows, dtype=np.bool_)
        alone[at] = False
        rows = table.filter(pa.array(alone))
        if rows.num_rows:
            found.rows[f"only_{side}"] += rows.num_rows
            _show(found, f"only_{side}", rows, rows)
            only[side].add(rows.filter(pc.is_valid(rows["url"])))


def _numbered(table: pa.Table) -> Any:
    """One sortable key a row: `pair_id`, and how many rows of it came before."""
    ids = np.frombuffer(b"".join(table["pair_id"].to_pylist()), dtype=[("high", ">u8"), ("low", ">u8")])
    keys = np.zeros(len(ids), dtype=[("high", "u8"), ("low", "u8"), ("number", "u4")])
    keys["high"], keys["low"] = ids["high"], ids["low"]
    order = np.lexsort((np.arange(len(ids)), keys["low"], keys["high"]))
    ordered = ids[order]
    first = np.ones(len(ids), dtype=np.bool_)
    first[1:] = ordered[1:] != ordered[:-1]
    starts = np.maximum.accumulate(np.where(first, np.arange(len(ids)), 0))
    keys["number"][order] = np.arange(len(ids)) - starts
    return keys


def _recaptioned(found: Difference, a: pa.Table, b: pa.Table) -> None:
    """Pairs on one side only whose URL has other captions on the other side."""
    shared = pc.is_in(a["url"], value_set=b["url"].combine_chunks().unique())
    urls = a["url"].filter(shared).combine_chunks().unique()
    if not len(urls):
        return
    found.changed["caption"] += len(urls)
    for url in urls.to_pylist()[: EXAMPLES - len(found.examples.get("caption", []))]:
        captions = [side["caption"].filter(pc.equal(side["url"], url)).to_pylist()[:EXAMPLES] for side in (a, b)]
        found.examples.setdefault("caption", []).append({"url": url, "a": captions[0], "b": captions[1]})


def _differ(a: Any, b: Any) -> Any:
    """Where two columns differ; null equals null."""
    return pc.or_(pc.fill_null(pc.not_equal(a, b), False), pc.xor(pc.is_null(a), pc.is_null(b)))


def _tally(counter: Counter[tuple[str, str]], a: Any, b: Any) -> None:
    grouped = pa.table({"a": a, "b": b}).group_by(["a", "b"], use_threads=False).aggregate([([], "count_all")])
    for row in grouped.to_pylist():
        counter[row["a"], row["b"]] += row["count_all"]


def _show(found: Difference, kind: str, a: pa.Table, b: pa.Table) -> None:
    examples = found.examples.setdefault(kind, [])
    for left, right in zip(_examples(a, examples), _examples(b, examples), strict=True):
        plain: Plain = {"pair_id": left["pair_id"].hex(), "key": right["key"], "url": right["url"]}
        if kind.startswith("only_"):
            plain |= {"status": left["status"], "reason": left["reason"]}
        else:
            names = [name for name in COLUMNS[1:] if left[name] != right[name] and name not in ("url", "caption")]
            if kind == "text":
                names += ["url", "caption"]
            plain |= {name: [left[name], right[name]] for name in names}
        if kind == "removed":
            plain = {"pair_id": plain["pair_id"], "key": plain["key"], "status": plain["status"]}
        examples.append(plain)


def _examples(table: pa.Table, there: list[Plain]) -> Iterator[Plain]:
    rows: list[Plain] = table.slice(0, EXAMPLES - len(there)).to_pylist()
    return iter(rows)
