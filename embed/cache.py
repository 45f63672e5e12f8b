"""Reading an embeddings artifact: by shard, in batches, or by row, with vectors as float16 views of Arrow's memory.

    cache = open_cache("runs/demo/embeddings")
    for batch in cache.batches(["pair_id", "image_embedding"], batch_rows=4096):
        batch.vectors("image_embedding")           # (N, D) float16, no copy
    cache.take([5, 70_000, 12], "text_embedding")  # rows of the whole cache, counted over its shards in order

Shapes: N rows, D embedding dimension.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from cluster.artifact import Artifact
from cluster.errors import WorkFailed

VECTOR_COLUMNS = ("image_embedding", "text_embedding")
HELD_BYTES = 256 << 20


@dataclass(frozen=True)
class EmbeddingBatch:
    """Consecutive rows of one shard. `start` is the first one's row within the shard."""

    shard: int
    start: int
    table: pa.Table

    @property
    def rows(self) -> int:
        return int(self.table.num_rows)

    def vectors(self, column: str) -> NDArray[np.float16]:
        """(N, D) float16; a view where Arrow holds the column in one piece, which every batch does."""
        return view_vectors(self.table.column(column))


class EmbeddingCache:
    """A published embeddings artifact, open for reading."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.shard_rows = np.array([entry.rows for entry in artifact.shards], dtype=np.int64)
        self.starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.shard_rows)])
        self._held: OrderedDict[tuple[int, str], NDArray[np.float16]] = OrderedDict()

    @property
    def rows(self) -> int:
        return int(self.starts[-1])

    @property
    def shard_count(self) -> int:
        return len(self.shard_rows)

    @property
    def dimension(self) -> int:
        return int(self._metadata["dimension"])

    @property
    def encoder(self) -> str:
        """Digest of the identity of the encoder that made the vectors."""
        return self._metadata["encoder"]

    def table(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One shard; only the named columns are read."""
        path = self.artifact.file(f"{shard:08d}.parquet")
        try:
            return pq.read_table(path, columns=None if columns is None else list(columns), memory_map=True)
        except (pa.ArrowException, OSError) as error:
            raise WorkFailed(f"{path} cannot be read: {error}") from error

    def vectors(self, shard: int, column: str) -> NDArray[np.float16]:
        """(N, D) float16 of a whole shard; the most recent ones are held, up to 256 MiB."""
        held = self._held.pop((shard, column), None)
        if held is None:
            held = view_vectors(self.table(shard, [column]).column(column))
        self._held[shard, column] = held
        while len(self._held) > 1 and sum(array.nbytes for array in self._held.values()) > HELD_BYTES:
            self._held.popitem(last=False)
        return held

    def batches(
        self, columns: Sequence[str], *, batch_rows: int = 4_096, shards: Sequence[int] | None = None
    ) -> Iterator[EmbeddingBatch]:
        """Rows in order, in batches that never span two shards."""
        for shard in range(self.shard_count) if shards is None else shards:
            table = self.table(shard, columns).combine_chunks()
            for start in range(0, table.num_rows, batch_rows):
                yield EmbeddingBatch(shard, start, table.slice(start, batch_rows))

    def take(self, rows: ArrayLike, column: str) -> NDArray[np.float16]:
        """Vectors (N, D) of the given rows of the whole cache, in the given order."""
        rows_N = np.asarray(rows, dtype=np.int64)
        if rows_N.size and not (rows_N.min() >= 0 and rows_N.max() < self.rows):
            raise IndexError(f"rows {rows_N.min()}…{rows_N.max()} were asked of a cache with {self.rows}")
        shards_N = np.searchsorted(self.starts, rows_N, side="right") - 1
        taken_ND = np.empty((rows_N.size, self.dimension), dtype=np.float16)
        for shard in np.unique(shards_N):
            here = np.flatnonzero(shards_N == shard)
            taken_ND[here] = self.vectors(int(shard), column)[rows_N[here] - self.starts[shard]]
        return taken_ND

    @cached_property
    def _metadata(self) -> dict[str, str]:
        metadata = pq.read_schema(self.artifact.file("00000000.parquet")).metadata or {}
        if b"dimension" not in metadata or b"encoder" not in metadata:
            raise WorkFailed(
                f"{self.artifact.uri} has no dimension or no encoder in its schema: it is no embedding cache"
            )
        return {name.decode(): value.decode() for name, value in metadata.items()}


def open_cache(uri: str) -> EmbeddingCache:
    """The embedding cache at `uri`. Raises `ArtifactNotFound` where none is published."""
    return EmbeddingCache(Artifact.open(uri))


def view_vectors(column: pa.ChunkedArray | pa.Array) -> NDArray[np.float16]:
    """A fixed_size_binary column as (N, D) float16. A copy only where it comes in several pieces."""
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    width = column.type.byte_width
    flat = np.frombuffer(column.buffers()[1], dtype="<f2", count=len(column) * width // 2, offset=column.offset * width)
    return flat.reshape(len(column), width // 2)
