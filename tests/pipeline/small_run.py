"""A run's folder with real pairs, images and view of a few rows, written with the project's own writers.

No web and no model: what a fetch would have brought is a function of the URL, so that a run built from pairs in which
rows are marked as removed is the reference for a takedown of these rows.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.artifact import Artifact, Request
from cluster.canonical import digest
from cluster.environment import environment
from cluster.parquet import write_table
from cluster.storage import Folder
from cluster.workshop import Workshop, begin
from embed.split import TRAIN, split_of
from ingest.ledger import PAIRS_SCHEMA, Mark, count_outcomes, ledger_table, row_key
from ingest.outcome import Outcome, Status
from ingest.tar import DeterministicTar
from pipeline.config import load_recipe

SHARD_ROWS = 5
VALIDATION = 0.25


@dataclass(frozen=True)
class Pair:
    """A row of a source; a URL that ends in `.gone` is not found."""

    url: str | None
    caption: str | None

    @property
    def pair_id(self) -> bytes:
        return hashlib.sha256(repr((self.url, self.caption)).encode()).digest()[:16]

    @property
    def picture(self) -> bytes:
        assert self.url is not None
        return f"picture of {self.url.partition('#')[0]}".encode() * 40


@dataclass
class SmallRun:
    """Builds artifacts under `folder`; `removed` are pair ids that the ingest is told to leave out."""

    path: Path
    rows: Sequence[Pair]
    evaluation: Sequence[Pair] = ()
    removed: frozenset[bytes] = frozenset()

    @property
    def folder(self) -> Folder:
        return Folder(self.path)

    def build(self) -> "SmallRun":
        config = load_recipe("tiny", [f"images.shard_rows={SHARD_ROWS}"])
        self.path.mkdir(parents=True)
        self.folder.write("run.json", json.dumps({"config": config.model_dump(mode="json")}).encode())
        for prefix, rows in (("", self.rows), ("evaluation/copies/", self.evaluation)):
            if rows:
                pairs = self.build_pairs(f"{prefix}pairs", rows)
                self.build_images(f"{prefix}images", pairs)
        self.build_view()
        return self

    def artifact(self, name: str) -> Artifact:
        return Artifact.open(self.folder / name)

    def build_pairs(self, name: str, rows: Sequence[Pair], amends: dict[str, Any] | None = None) -> Artifact:
        workshop = begin(self.folder / name, Request(name, 1, {"rows": "given"}, {}), environment(), amends=amends)
        seen: set[bytes] = set()
        table = []
        for number, row in enumerate(rows):
            mark = Mark.REMOVED if row.pair_id in self.removed else Mark.DUPLICATE if row.pair_id in seen else None
            seen.add(row.pair_id)
            kept = mark != Mark.REMOVED
            table.append(
                {"source_file": "t.parquet", "source_row": number, "pair_id": row.pair_id, "mark": mark}
                | {"url": row.url if kept else None, "caption": row.caption if kept else None}
            )
        shards = [table[start : start + SHARD_ROWS] for start in range(0, len(table), SHARD_ROWS)]
        for shard, part in enumerate(shards):
            marks = Counter(row["mark"] for row in part)
            with workshop.attempt(shard) as attempt:
                write_table(attempt.path(f"{shard:08d}.parquet"), pa.Table.from_pylist(part, PAIRS_SCHEMA))
                counts = {"unique": marks[None], "duplicate": marks[Mark.DUPLICATE]}
                counts |= {"removed": marks[Mark.REMOVED]}
                attempt.commit(rows=len(part), counts=counts)
        return workshop.publish(len(shards))

    def begin_images(self, name: str, pairs: Artifact, amends: dict[str, Any] | None = None) -> Workshop:
        request = Request(name, 1, {"size": 64}, {pairs.manifest.kind: pairs.content_digest})
        return begin(self.folder / name, request, environment(), amends=amends)

    def build_images(self, name: str, pairs: Artifact) -> Artifact:
        workshop = self.begin_images(name, pairs)
        for shard in range(pairs.shard_count):
            commit_images(workshop, pairs, shard)
        return workshop.publish(pairs.shard_count)

    def build_view(self) -> Artifact:
        """A view as large as the images, without embeddings: as much of one as a takedown looks at."""
        images = self.artifact("images")
        request = Request("view", 1, {}, {"images": images.content_digest})
        workshop = begin(self.folder / "view", request, environment())
        for entry in images.shards:
            ledger = pq.read_table(images.file(f"{entry.shard:08d}.parquet"))
            ids = [row["pair_id"] for row in ledger.to_pylist() if row["status"] == "ok"]
            splits = [split_of(one, VALIDATION) for one in ids]
            with workshop.attempt(entry.shard) as attempt:
                columns = {"pair_id": pa.array(ids, pa.binary(16)), "included": pa.array([True] * len(ids), pa.bool_())}
                write_table(
                    attempt.path(f"{entry.shard:08d}.parquet"),
                    pa.table(columns | {"split": pa.array(splits, pa.string())}),
                )
                attempt.commit(rows=len(ids), counts={"train": splits.count(TRAIN)})
        return workshop.publish(images.shard_count)

    def build_model(self, name: str) -> None:
        """A published model, as far as its manifest goes, and a checkpoint of it at step 400."""
        inputs = {source: self.artifact(source).content_digest for source in ("images", "view")}
        settings = {"training": {"steps": 400}, "validation_fraction": VALIDATION}
        workshop = begin(self.folder / name, Request(name, 1, settings, inputs), environment())
        checkpoint = {"step": 400, "trained": {"inputs": inputs}, "files": {}}
        (workshop.work / "checkpoints" / "checkpoint-00000400").write(
            "checkpoint.json", json.dumps(checkpoint).encode()
        )
        with workshop.attempt(0) as attempt:
            attempt.path("model.safetensors").write_bytes(b"weights")
            attempt.commit(rows=len(self.rows), counts={"steps": 400})
        workshop.publish(1)


def commit_images(workshop: Workshop, pairs: Artifact, shard: int, *, fails: Iterable[str] = ()) -> None:
    """One shard of images as the images stage writes it. `fails` are URLs that do not answer this time."""
    table = pq.read_table(pairs.file(f"{shard:08d}.parquet"))
    keys = [row_key(shard, row, SHARD_ROWS) for row in range(table.num_rows)]
    outcomes: list[Outcome | None] = []
    failing: Counter[str] = Counter()
    with workshop.attempt(shard) as attempt:
        with attempt.path(f"{shard:08d}.tar").open("wb") as file, DeterministicTar(file) as tar:
            for key, row in zip(keys, table.to_pylist(), strict=True):
                outcomes.append(_outcome(tar, key, row, frozenset(fails)))
                if outcomes[-1].status == Status.FETCH_FAILED:  # type: ignore[union-attr]
                    failing[row["url"].split("/")[2]] += 1
        write_table(attempt.path(f"{shard:08d}.parquet"), ledger_table(table, keys, outcomes))
        counts, reasons = count_outcomes([outcome for outcome in outcomes if outcome is not None])
        stats = {"seconds": 1.5, "reasons": reasons, "failing_hosts": dict(failing), "attempts": 7}
        made_from = digest([pairs.shards[shard].sha256])
        attempt.commit(rows=table.num_rows, counts=counts, stats=stats, made_from=made_from)


def _outcome(tar: DeterministicTar, key: str, row: dict[str, Any], fails: frozenset[str]) -> Outcome:
    if row["mark"] is not None:
        return Outcome(Status.DUPLICATE if row["mark"] == Mark.DUPLICATE else Status.REMOVED)
    pair = Pair(row["url"], row["caption"])
    if pair.url is None:
        return Outcome(Status.REFUSED, "url_missing")
    if pair.url.endswith(".gone") or pair.url in fails:
        return Outcome(Status.FETCH_FAILED, "http_404")
    fetched, stored = pair.picture, pair.picture[::-1]
    offset = tar.add(f"{key}.jpg", stored)
    tar.add(f"{key}.txt", (pair.caption or "").encode())
    tar.add(f"{key}.json", json.dumps({"url": pair.url, "caption": pair.caption}).encode())
    hashes = [hashlib.sha256(data).hexdigest() for data in (fetched, stored)]
    return Outcome(Status.OK, None, hashes[0], hashes[1], 64, 64, 300, 200, offset, len(stored))
