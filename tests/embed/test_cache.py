from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import ArtifactNotFound, WorkFailed
from embed.cache import open_cache

Publish = Callable[..., str]
RNG = np.random.default_rng(0)
SHARDS = [(RNG.normal(size=(count, 8)), RNG.normal(size=(count, 8))) for count in (5, 0, 9)]


def unit(vectors_ND: np.ndarray) -> np.ndarray:
    vectors_ND = vectors_ND.astype(np.float32).astype(np.float64)
    return (vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)).astype(np.float16)


IMAGE_ND = np.concatenate([unit(image_ND) for image_ND, _ in SHARDS])


def test_batches_give_every_row_once_in_order_as_views(cache: Publish) -> None:
    opened = open_cache(cache("cache", SHARDS))
    batches = list(opened.batches(["key", "image_embedding"], batch_rows=4))
    assert [(batch.shard, batch.start, batch.rows) for batch in batches] == [
        (0, 0, 4), (0, 4, 1), (2, 0, 4), (2, 4, 4), (2, 8, 1),
    ]  # fmt: skip
    vectors = [batch.vectors("image_embedding") for batch in batches]
    np.testing.assert_allclose(np.concatenate(vectors), IMAGE_ND, atol=1e-3)
    assert not any(vector.flags.owndata for vector in vectors)


def test_rows_are_taken_from_any_shard_in_the_asked_order(cache: Publish) -> None:
    opened = open_cache(cache("cache", SHARDS))
    rows = [13, 0, 5, 4, 13]
    np.testing.assert_array_equal(
        opened.take(rows, "image_embedding"),
        np.concatenate([opened.vectors(shard, "image_embedding") for shard in range(3)])[rows],
    )
    assert opened.rows == 14
    assert opened.take([], "text_embedding").shape == (0, 8)


@pytest.mark.parametrize("rows", [[14], [-1]])
def test_rows_that_are_not_there_are_an_error(cache: Publish, rows: list[int]) -> None:
    with pytest.raises(IndexError, match="14"):
        open_cache(cache("cache", SHARDS)).take(rows, "image_embedding")


def test_nothing_published_and_a_broken_file_are_told_apart(cache: Publish, tmp_path: Path) -> None:
    with pytest.raises(ArtifactNotFound):
        open_cache(str(tmp_path / "nowhere"))
    uri = cache("cache", SHARDS)
    path = Path(uri) / "00000002.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(WorkFailed, match=r"00000002\.parquet cannot be read"):
        open_cache(uri).table(2)
