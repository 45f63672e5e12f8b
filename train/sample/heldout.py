"""The captions that a run's samples are drawn for: of each evaluation set, or of the validation split without one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.artifact import Artifact
from cluster.errors import UserError
from embed.cache import EmbeddingCache, open_cache
from embed.view import training_rows
from train.families.config import SamplesConfig

VALIDATION = "validation"


@dataclass(frozen=True)
class CaptionSet:
    """Rows of an embedding cache with a caption, in order; z_i and z_t are (N, D) unit vectors."""

    name: str
    captions: list[str]
    z_i: NDArray[np.float32]
    z_t: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.captions)

    def first(self, count: int) -> CaptionSet:
        return CaptionSet(self.name, self.captions[:count], self.z_i[:count], self.z_t[:count])

    def distinct(self, count: int) -> CaptionSet:
        """The first `count` rows whose captions differ."""
        rows = list({caption: row for row, caption in reversed(list(enumerate(self.captions)))}.values())
        rows = sorted(rows)[:count]
        return CaptionSet(self.name, [self.captions[row] for row in rows], self.z_i[rows], self.z_t[rows])


def heldout_sets(uris: Mapping[str, str], config: SamplesConfig) -> list[CaptionSet]:
    """The sets that `samples.sets` names; by default every evaluation set, else the validation split."""
    evaluation = {
        name.split("/")[1]: uri
        for name, uri in sorted(uris.items())
        if name.startswith("evaluation/") and name.endswith("/embeddings")
    }
    chosen = config.sets if config.sets is not None else (tuple(evaluation) or (VALIDATION,))
    found = []
    for name in chosen:
        if name in evaluation:
            found.append(_all_rows(name, open_cache(evaluation[name])))
        elif name == VALIDATION:
            found.append(_split_rows(VALIDATION, uris, training=False))
        else:
            known = ", ".join([*evaluation, VALIDATION])
            raise UserError(f"samples.sets names {name!r}, which this run does not have; it has {known}")
    return [each for each in found if len(each)]


def training_set(uris: Mapping[str, str], *, rows: int) -> CaptionSet:
    """The first rows that models train on."""
    return _split_rows("training", uris, training=True, limit=rows)


def _all_rows(name: str, cache: EmbeddingCache) -> CaptionSet:
    return _rows(name, cache, dict.fromkeys(range(cache.shard_count)))


def _split_rows(name: str, uris: Mapping[str, str], *, training: bool, limit: int | None = None) -> CaptionSet:
    cache, view = open_cache(uris["embeddings"]), Artifact.open(uris["view"])
    chosen: dict[int, NDArray[np.int64] | None] = {}
    count = 0
    for shard in range(cache.shard_count):
        rows = training_rows(view, shard) if training else _validation_rows(view, shard)
        chosen[shard] = rows
        count += len(rows)
        if limit is not None and count >= limit:
            break
    found = _rows(name, cache, chosen)
    return found if limit is None else found.first(limit)


def _validation_rows(view: Artifact, shard: int) -> NDArray[np.int64]:
    table = pq.read_table(view.file(f"{shard:08d}.parquet"), columns=["row", "included", "split"])
    inside = table.column("included").to_numpy() & (table.column("split").to_numpy(zero_copy_only=False) == VALIDATION)
    rows: NDArray[np.int64] = table.column("row").to_numpy()[inside].astype(np.int64)
    return rows


def _rows(name: str, cache: EmbeddingCache, chosen: Mapping[int, NDArray[np.int64] | None]) -> CaptionSet:
    captions: list[str] = []
    vectors: dict[str, list[NDArray[Any]]] = {"image_embedding": [], "text_embedding": []}
    for shard, rows in chosen.items():
        here = cache.table(shard, ["caption"]).column("caption").to_pylist()
        wanted = range(len(here)) if rows is None else rows.tolist()
        kept = [row for row in wanted if here[row]]
        captions += [here[row] for row in kept]
        for column, parts in vectors.items():
            parts.append(cache.vectors(shard, column)[kept])
    z_i_ND, z_t_ND = (_unit(parts, cache.dimension) for parts in vectors.values())
    return CaptionSet(name, captions, z_i_ND, z_t_ND)


def _unit(parts: list[NDArray[Any]], dimension: int) -> NDArray[np.float32]:
    joined = np.concatenate(parts).astype(np.float32) if parts else np.zeros((0, dimension), np.float32)
    unit: NDArray[np.float32] = joined / np.linalg.norm(joined, axis=1, keepdims=True).clip(min=1e-12)
    return unit
