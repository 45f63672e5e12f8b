"""The `dedup` stage: which training pictures are (nearly) in an evaluation set, judged by their CLIP embeddings.

    matches.parquet       every match above the set's threshold: training pair, evaluation picture, score, rank
    contamination.json    per evaluation set: how many of its pictures have a match, with an interval

A model that is judged on pictures that it was trained on is not judged; the view leaves out what is matched here.
`matches_per_query` bounds the rows kept for one training picture (a blank one may match a whole set), never the
number of training pictures found; what the bound cut is counted as overflow.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.artifact import Artifact
from cluster.canonical import canonical_json
from cluster.errors import UserError, WorkFailed
from cluster.parquet import write_table
from cluster.workshop import Workshop
from embed.cache import EmbeddingCache, open_cache
from embed.config import DedupConfig
from embed.interval import clopper_pearson
from embed.search import FlatSearch
from embed.stored_rows import stored_rows

MATCHES_FILE, CONTAMINATION_FILE = "matches.parquet", "contamination.json"
MATCHES_SCHEMA = pa.schema(
    [
        ("pair_id", pa.binary(16)),
        ("evaluation_set", pa.string()),
        ("evaluation_key", pa.string()),
        ("score", pa.float32()),
        ("rank", pa.int32()),
    ]
)
CONFIDENCE = 0.95


def member(payload: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Gang member. Payload: `embeddings`, `evaluation` and `evaluation_images` (URIs by set), `config`, `out`."""
    config = DedupConfig.model_validate(payload["config"])
    training = open_cache(payload["embeddings"])
    evaluation_uris: dict[str, str] = payload["evaluation"]
    unknown = sorted(config.thresholds.keys() - evaluation_uris.keys())
    if unknown:
        known = ", ".join(evaluation_uris) or "none"
        raise UserError(f"dedup.thresholds names {unknown[0]!r}, which is no evaluation set; there are: {known}")
    sets = [
        EvaluationSet(name, open_cache(uri), payload["evaluation_images"][name], config)
        for name, uri in evaluation_uris.items()
    ]
    for evaluation in sets:
        evaluation.check_against(training)
    tables = [MATCHES_SCHEMA.empty_table()]
    done = 0
    for batch in training.batches(["pair_id", "image_embedding"], batch_rows=config.batch_rows):
        vectors_ND = batch.vectors("image_embedding")
        if not np.isfinite(vectors_ND).all():
            raise WorkFailed(f"{training.artifact.uri} shard {batch.shard} holds NaN; run `unclip verify` on it")
        pair_ids = batch.table.column("pair_id")
        tables += [evaluation.match(pair_ids, vectors_ND) for evaluation in sets]
        done += batch.rows
        report({"done": done, "total": training.rows, "unit": "rows"})
    contamination = {
        "features": "clip image embedding",
        "encoder": training.encoder if training.rows else None,
        "training_rows": training.rows,
        "evaluation_sets": [evaluation.contamination() for evaluation in sets],
    }
    matches = pa.concat_tables(tables)
    with Workshop.from_plain(payload["out"]).attempt(0) as attempt:
        write_table(attempt.path(MATCHES_FILE), matches)
        attempt.path(CONTAMINATION_FILE).write_bytes(canonical_json(contamination) + b"\n")
        attempt.commit(rows=matches.num_rows, counts={"matches": matches.num_rows})
    return contamination


class EvaluationSet:
    """One evaluation set, ready to be searched, and what has been found in it so far."""

    def __init__(self, name: str, cache: EmbeddingCache, images_uri: str, config: DedupConfig) -> None:
        self.name = name
        self.rows = cache.rows
        self._cache = cache
        self._threshold = config.threshold_of(name)
        self._chosen = "by hand for this set" if name in config.thresholds else "by hand, dedup.threshold"
        self._per_query = config.matches_per_query
        self._keys = np.array(_evaluation_keys(Artifact.open(images_uri), cache), dtype=object)
        self._matched = np.zeros(self.rows, dtype=np.bool_)
        self._counts = {"matches": 0, "training_rows_matched": 0, "overflow": 0}
        if self.rows:
            shards = [cache.vectors(shard, "image_embedding") for shard in range(cache.shard_count)]
            vectors_ED = np.concatenate([shard for shard in shards if len(shard)])
            if not np.isfinite(vectors_ED).all():
                raise WorkFailed(f"{cache.artifact.uri} holds NaN; run `unclip verify` on it")
            self._search = FlatSearch(vectors_ED)

    def check_against(self, training: EmbeddingCache) -> None:
        """Raises `UserError` where the two caches were made by different CLIPs, or by one CLIP run differently."""
        if not self.rows or not training.rows:
            return
        if self._cache.dimension != training.dimension:
            raise UserError(
                f"evaluation set {self.name} has vectors of {self._cache.dimension} dimensions and the training cache "
                f"of {training.dimension}; encode both with one CLIP"
            )
        if self._cache.encoder != training.encoder:
            raise UserError(
                f"evaluation set {self.name} was encoded by {self._cache.encoder[:12]}… and the training cache by "
                f"{training.encoder[:12]}…; encode both with one CLIP at one precision, batch size and thread count"
            )

    def match(self, pair_ids: pa.ChunkedArray, vectors_ND: np.ndarray[Any, np.dtype[np.float16]]) -> pa.Table:
        """Rows of matches.parquet for a batch of training rows."""
        if not self.rows:
            return MATCHES_SCHEMA.empty_table()
        found = self._search.above(vectors_ND, self._threshold)
        self._matched[found.evaluation] = True
        kept, rank_M, overflow = found.bounded(self._per_query)
        self._counts["matches"] += len(kept.query)
        self._counts["training_rows_matched"] += len(np.unique(kept.query))
        self._counts["overflow"] += overflow
        return pa.table(
            [
                pair_ids.take(pa.array(kept.query)).combine_chunks(),
                pa.array([self.name] * len(kept.query), pa.string()),
                pa.array(self._keys[kept.evaluation].tolist(), pa.string()),
                pa.array(kept.score, pa.float32()),
                pa.array(rank_M, pa.int32()),
            ],
            schema=MATCHES_SCHEMA,
        )

    def contamination(self) -> dict[str, Any]:
        matched = int(self._matched.sum())
        low, high = clopper_pearson(matched, self.rows, CONFIDENCE)
        return {
            "name": self.name,
            "rows": self.rows,
            "matched_rows": matched,
            "overlap": matched / self.rows if self.rows else None,
            "interval": [low, high],
            "confidence": CONFIDENCE,
            "threshold": self._threshold,
            "threshold_chosen": self._chosen,
            **self._counts,
        }


def read_contamination(dedup_uri: str) -> dict[str, Any]:
    contamination: dict[str, Any] = json.loads(Artifact.open(dedup_uri).file(CONTAMINATION_FILE).read_bytes())
    return contamination


def _evaluation_keys(images: Artifact, cache: EmbeddingCache) -> list[str]:
    """For every row of the cache the URL or file name that the user gave for it."""
    keys: list[str] = []
    for shard in range(cache.shard_count):
        given = {row.key: row.url or row.source_file for row in stored_rows(images, shard)}
        for key in cache.table(shard, ["key"]).column("key").to_pylist():
            if key not in given:
                raise WorkFailed(
                    f"{cache.artifact.uri} has the row {key}, which is not ok in {images.uri}; "
                    "the embeddings are older than the images: run again to bring them up to date"
                )
            keys.append(given[key])
    return keys
