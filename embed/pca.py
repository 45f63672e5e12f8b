"""The `pca` stage: principal components of the image embeddings that training sees (unCLIP §2.2).

    components.parquet    index, eigenvalue, explained_share, vector, low, high: all components by falling eigenvalue;
                          the code range [low, high] is null beyond the kept ones
    statistics.json       dimension, count, mean, kept, total_variance, scale, buckets, clipped_share, dot_quantiles

The paper keeps 319 of 1,024 components (> 99% of the variance) in 1,024 buckets each. `scale` is what an embedding
is multiplied by to have unit variance a dimension on average: the diffusion prior's 17.2 as measured here.
`dot_quantiles` are the percentiles 0 … 100 of z_i·z_t, for the autoregressive prior's dot token.

Shapes: N rows, D embedding dimension, K kept components.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.artifact import Artifact
from cluster.canonical import canonical_json
from cluster.errors import UserError, WorkFailed
from cluster.parquet import write_table
from cluster.workshop import Workshop
from embed.cache import EmbeddingCache, open_cache
from embed.config import PcaConfig
from embed.moments import Float64, Moments, merge
from embed.split import is_validation
from embed.view import training_rows

COMPONENTS_FILE, STATISTICS_FILE = "components.parquet", "statistics.json"
COMPONENTS_SCHEMA = pa.schema(
    [
        ("index", pa.int32()),
        ("eigenvalue", pa.float64()),
        ("explained_share", pa.float64()),
        ("vector", pa.list_(pa.float64())),
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)


def member(payload: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Gang member. Payload: `embeddings`, `view`, `config`, `out`."""
    config = PcaConfig.model_validate(payload["config"])
    cache = open_cache(payload["embeddings"])
    view = Artifact.open(payload["view"])

    def shard_moments() -> Iterator[Moments]:
        for shard in range(cache.shard_count):
            yield Moments.of(cache.vectors(shard, "image_embedding")[training_rows(view, shard)])
            report({"done": shard + 1, "total": cache.shard_count, "unit": "shards"})

    moments = merge(shard_moments(), cache.dimension, group=config.group_shards)
    if moments.count < 2:
        raise UserError(f"{view.uri} has {moments.count} training rows; a PCA needs two at least")
    components = decompose(moments, config)
    projections_NK, dots_N = _sample(cache, view, moments, components, config)
    low_K, high_K = np.quantile(projections_NK, config.range_quantiles, axis=0)
    clipped = float(((projections_NK < low_K) | (projections_NK > high_K)).mean())
    statistics = {
        "dimension": cache.dimension,
        "count": moments.count,
        "mean": moments.mean().tolist(),
        "kept": components.kept,
        "kept_share": float(components.explained_share[: components.kept].sum()),
        "total_variance": float(components.eigenvalue.sum()),
        "scale": float(np.sqrt(cache.dimension / components.eigenvalue.sum())),
        "buckets": config.buckets,
        "clipped_share": clipped,
        "sampled_rows": len(dots_N),
        "dot_quantiles": np.quantile(dots_N, np.linspace(0.0, 1.0, 101)).tolist(),
    }
    with Workshop.from_plain(payload["out"]).attempt(0) as attempt:
        write_table(attempt.path(COMPONENTS_FILE), components.table(low_K, high_K))
        attempt.path(STATISTICS_FILE).write_bytes(canonical_json(statistics) + b"\n")
        attempt.commit(rows=cache.dimension, counts={"kept": components.kept})
    return {name: statistics[name] for name in ("count", "kept", "kept_share", "scale", "clipped_share")}


@dataclass(frozen=True)
class Components:
    """Eigenvalues (D,), their shares (D,) and vectors (D, D), a component a row, by falling eigenvalue."""

    eigenvalue: Float64
    explained_share: Float64
    vector: Float64
    kept: int

    def table(self, low_K: Float64, high_K: Float64) -> pa.Table:
        beyond = [None] * (len(self.eigenvalue) - self.kept)
        columns: list[Any] = [
            np.arange(len(self.eigenvalue), dtype=np.int32),
            self.eigenvalue,
            self.explained_share,
            list(self.vector),
            [*low_K.tolist(), *beyond],
            [*high_K.tolist(), *beyond],
        ]
        arrays = [pa.array(values, field.type) for values, field in zip(columns, COMPONENTS_SCHEMA, strict=True)]
        return pa.table(arrays, schema=COMPONENTS_SCHEMA)


def decompose(moments: Moments, config: PcaConfig) -> Components:
    """Eigen-decomposition of the covariance. An eigenvector's sign is free: its largest entry is made positive."""
    eigenvalue_D, vector_DD = np.linalg.eigh(moments.covariance())
    eigenvalue_D, vector_DD = np.maximum(eigenvalue_D[::-1], 0.0), vector_DD.T[::-1]
    largest_D = np.abs(vector_DD).argmax(axis=1)
    vector_DD = vector_DD * np.sign(vector_DD[np.arange(len(vector_DD)), largest_D])[:, None]
    total = eigenvalue_D.sum()
    if total <= 0.0:
        raise WorkFailed("all training rows have the same image embedding, so there is nothing to decompose")
    share_D = eigenvalue_D / total
    return Components(eigenvalue_D, share_D, np.ascontiguousarray(vector_DD), _kept(share_D, config))


class PcaCodec:
    """Image embeddings to bucket numbers and back, for the autoregressive prior and for probes."""

    def __init__(self, mean_D: Float64, vector_KD: Float64, low_K: Float64, high_K: Float64, buckets: int) -> None:
        self.mean_D, self.vector_KD, self.buckets = mean_D, vector_KD, buckets
        self.low_K, self.width_K = low_K, np.maximum(high_K - low_K, np.finfo(np.float64).tiny) / buckets

    @classmethod
    def open(cls, pca_uri: str) -> "PcaCodec":
        artifact = Artifact.open(pca_uri)
        statistics = json.loads(artifact.file(STATISTICS_FILE).read_bytes())
        table = pq.read_table(artifact.file(COMPONENTS_FILE)).slice(0, statistics["kept"])
        vector_KD = np.array(table.column("vector").to_pylist(), dtype=np.float64)
        low_K, high_K = (table.column(name).to_numpy() for name in ("low", "high"))
        return cls(np.array(statistics["mean"]), vector_KD, low_K, high_K, statistics["buckets"])

    @property
    def components(self) -> int:
        return len(self.vector_KD)

    def encode(self, embeddings_ND: NDArray[Any]) -> NDArray[np.int64]:
        """Codes (N, K) in [0, buckets): a projection outside its range gets the nearest end's bucket."""
        position_NK = (self.project(embeddings_ND) - self.low_K) / self.width_K
        return np.clip(np.floor(position_NK), 0, self.buckets - 1).astype(np.int64)

    def decode(self, codes_NK: NDArray[Any]) -> Float64:
        """Embeddings (N, D) from the middles of the buckets."""
        projections_NK = self.low_K + (codes_NK + 0.5) * self.width_K
        return self.mean_D + projections_NK @ self.vector_KD

    def project(self, embeddings_ND: NDArray[Any]) -> Float64:
        """Coordinates (N, K) along the kept components."""
        projections_NK: Float64 = (embeddings_ND.astype(np.float64) - self.mean_D) @ self.vector_KD.T
        return projections_NK


def _kept(share_D: Float64, config: PcaConfig) -> int:
    if config.components is not None:
        if config.components > len(share_D):
            raise UserError(
                f"pca.components is {config.components}, but the embeddings have {len(share_D)} dimensions; "
                "set fewer, or leave it out and set pca.share"
            )
        return config.components
    return min(int(np.searchsorted(np.cumsum(share_D), config.share) + 1), len(share_D))


def _sample(
    cache: EmbeddingCache, view: Artifact, moments: Moments, components: Components, config: PcaConfig
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Projections (N, K) and z_i·z_t (N,) of training rows drawn by a hash of their pair_id."""
    fraction = min(1.0, config.sample_rows / moments.count)
    mean_D, vector_DK = moments.mean(), components.vector[: components.kept].T
    projections, dots = [], []
    for shard in range(cache.shard_count):
        rows = training_rows(view, shard)
        if fraction < 1.0:
            pair_ids = cache.table(shard, ["pair_id"]).column("pair_id").take(pa.array(rows)).to_pylist()
            # The split's hash again, on another pair of values, so that the draw is independent of the split.
            rows = rows[is_validation((b"pca" + pair_id for pair_id in pair_ids), fraction)]
        image_ND = cache.vectors(shard, "image_embedding")[rows].astype(np.float64)
        text_ND = cache.vectors(shard, "text_embedding")[rows].astype(np.float64)
        projections.append(((image_ND - mean_D) @ vector_DK).astype(np.float32))
        dots.append(np.einsum("nd,nd->n", image_ND, text_ND).astype(np.float32))
    return np.concatenate(projections), np.concatenate(dots)
