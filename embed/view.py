"""The `view` stage: which rows of the cache training may see, why the others are out, and the split.

One row an embeddings row, in the same shards and order, so that a reader goes from a view row to its vector by its
number. Rows stay in their split whether they are included or not.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.artifact import Artifact
from cluster.parquet import write_table
from cluster.workshop import Workshop
from embed.cache import open_cache
from embed.config import ViewConfig
from embed.dedup import MATCHES_FILE
from embed.split import TRAIN, VALIDATION, is_validation

VIEW_SCHEMA = pa.schema(
    [
        ("row", pa.int32()),
        ("pair_id", pa.binary(16)),
        ("included", pa.bool_()),
        ("reason", pa.string()),
        ("split", pa.string()),
    ]
)


def member(payload: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Gang member. Payload: `embeddings`, `dedup` (URI or null), `config`, `out`."""
    config = ViewConfig.model_validate(payload["config"])
    cache = open_cache(payload["embeddings"])
    overlaps = _overlaps(payload["dedup"]) if payload["dedup"] and config.exclude_overlap else {}
    workshop = Workshop.from_plain(payload["out"])
    committed = workshop.committed()
    for shard in range(cache.shard_count):
        if shard not in committed:
            pair_ids = cache.table(shard, ["pair_id"]).column("pair_id").to_pylist()
            table, counts = view_table(pair_ids, overlaps, config.validation_fraction)
            with workshop.attempt(shard) as attempt:
                write_table(attempt.path(f"{shard:08d}.parquet"), table)
                attempt.commit(rows=table.num_rows, counts=counts)
        report({"done": shard + 1, "total": cache.shard_count, "unit": "shards"})
    return {"shards": cache.shard_count, "rows": cache.rows}


def view_table(
    pair_ids: list[bytes], overlaps: Mapping[bytes, str], validation_fraction: float
) -> tuple[pa.Table, dict[str, int]]:
    """The view of one shard, and its rows by outcome: train, validation, overlap."""
    reasons = [f"overlap:{overlaps[pair_id]}" if pair_id in overlaps else None for pair_id in pair_ids]
    validation = is_validation(pair_ids, validation_fraction)
    included = np.array([reason is None for reason in reasons], dtype=np.bool_)
    table = pa.table(
        [
            pa.array(np.arange(len(pair_ids), dtype=np.int32)),
            pa.array(pair_ids, pa.binary(16)),
            pa.array(included),
            pa.array(reasons, pa.string()),
            pa.array([VALIDATION if there else TRAIN for there in validation], pa.string()),
        ],
        schema=VIEW_SCHEMA,
    )
    counts = {
        "train": int((included & ~validation).sum()),
        "validation": int((included & validation).sum()),
        "overlap": int((~included).sum()),
    }
    return table, counts


def training_rows(view: Artifact, shard: int) -> NDArray[np.int64]:
    """Rows (within the embeddings shard) that models train on: in the view, and in the training split."""
    table = pq.read_table(view.file(f"{shard:08d}.parquet"), columns=["row", "included", "split"])
    included = np.asarray(table.column("included").to_numpy(zero_copy_only=False), dtype=np.bool_)
    split = np.asarray(table.column("split").to_numpy(zero_copy_only=False))
    return np.flatnonzero(included & (split == TRAIN)).astype(np.int64)


def _overlaps(dedup_uri: str) -> dict[bytes, str]:
    """Matched training pairs with the evaluation sets that they are in, comma-separated in alphabetical order."""
    table = pq.read_table(Artifact.open(dedup_uri).file(MATCHES_FILE), columns=["pair_id", "evaluation_set"])
    sets: dict[bytes, set[str]] = {}
    for pair_id, name in zip(
        table.column("pair_id").to_pylist(), table.column("evaluation_set").to_pylist(), strict=True
    ):
        sets.setdefault(pair_id, set()).add(name)
    return {pair_id: ",".join(sorted(names)) for pair_id, names in sets.items()}
