import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cluster.artifact import Artifact
from cluster.errors import WorkFailed
from embed.cache import open_cache
from embed.clip import load_encoder
from embed.config import EmbeddingsConfig
from embed.description import encoder_digest
from embed.stored_rows import open_pictures, stored_rows

Publish = Callable[..., str]


def bytes_of(uri: str) -> list[bytes]:
    artifact = Artifact.open(uri)
    return [artifact.file(f"{shard:08d}.parquet").read_bytes() for shard in range(artifact.shard_count)]


def test_every_ok_row_is_there_in_ledger_order_with_its_hashes(clip: Publish, images: Publish, encode: Publish) -> None:
    images_uri = images("images", [7, 5], lost=[0, 3, 11])
    uri = encode("embeddings", clip(), images_uri)
    cache = open_cache(uri)
    assert cache.shard_rows.tolist() == [5, 4]
    for shard in range(2):
        rows = stored_rows(Artifact.open(images_uri), shard)
        table = cache.table(shard)
        assert table.column("key").to_pylist() == [row.key for row in rows]
        assert table.column("pair_id").to_pylist() == [row.pair_id for row in rows]
        assert table.column("stored_sha256").to_pylist() == [row.stored_sha256 for row in rows]
        captions = table.column("caption").to_pylist()
        assert table.column("caption_sha256").to_pylist() == [
            hashlib.sha256(caption.encode()).hexdigest() for caption in captions
        ]


def test_vectors_times_norms_are_the_clips_own(clip: Publish, images: Publish, encode: Publish) -> None:
    clip_uri, images_uri = clip(), images("images", [6])
    cache = open_cache(encode("embeddings", clip_uri, images_uri))
    encoder, artifact = load_encoder(clip_uri), Artifact.open(images_uri)
    rows = stored_rows(artifact, 0)
    with open_pictures(artifact, 0) as pictures:
        pixels = np.stack([encoder.preprocess(pictures.read(row)) for row in rows])
    image_ND = encoder.encode_image(torch.from_numpy(pixels)).numpy()
    text_ND = encoder.encode_text(encoder.tokenize([row.text for row in rows])[0]).numpy()
    for column, expected_ND in (("image", image_ND), ("text", text_ND)):
        unit_ND = cache.vectors(0, f"{column}_embedding").astype(np.float64)
        norm_N = cache.table(0, [f"{column}_norm"]).column(0).to_numpy()
        assert np.abs(np.linalg.norm(unit_ND, axis=1) - 1.0).max() < 1e-3
        np.testing.assert_allclose(unit_ND * norm_N[:, None], expected_ND, rtol=2e-3, atol=2e-4 * norm_N.max())


def test_bytes_do_not_depend_on_order_of_shards_or_decode_threads(
    clip: Publish, images: Publish, encode: Publish
) -> None:
    clip_uri, images_uri = clip(), images("images", [6, 5, 9])
    one = encode("one", clip_uri, images_uri, decode_threads=1)
    other = encode("other", clip_uri, images_uri, order=[2, 0, 1], decode_threads=4)
    assert bytes_of(one) == bytes_of(other)
    assert Artifact.open(one).content_digest == Artifact.open(other).content_digest


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_rows_bytes_do_not_depend_on_its_neighbours(
    clip: Publish, images: Publish, encode: Publish, precision: str
) -> None:
    """Without the first two rows, each other row stands at another place of another batch."""
    clip_uri = clip()
    whole = open_cache(encode("whole", clip_uri, images("all", [11]), precision=precision))
    part = open_cache(encode("part", clip_uri, images("part", [11], lost=[0, 1]), precision=precision))
    for column in ("image_embedding", "text_embedding"):
        assert np.array_equal(whole.vectors(0, column)[2:], part.vectors(0, column))


def test_empty_shards_and_shards_of_one_row(clip: Publish, images: Publish, encode: Publish) -> None:
    cache = open_cache(encode("embeddings", clip(), images("images", [3, 1, 2], lost=[0, 1, 2])))
    assert cache.shard_rows.tolist() == [0, 1, 2]
    assert cache.vectors(0, "image_embedding").shape == (0, 24)


def test_captions_that_were_cut_are_counted(clip: Publish, images: Publish, encode: Publish, tiny_clip: dict) -> None:
    short = {**tiny_clip, "text_cfg": {**tiny_clip["text_cfg"], "context_length": 5}}
    uri = encode("embeddings", clip(model_cfg=short), images("images", [4]))
    assert Artifact.open(uri).manifest.totals["counts"] == {"captions_cut": 4, "ok": 4}


def test_the_cache_names_its_encoder(clip: Publish, images: Publish, encode: Publish) -> None:
    clip_uri = clip()
    cache = open_cache(encode("embeddings", clip_uri, images("images", [2])))
    expected = encoder_digest(load_encoder(clip_uri).description, EmbeddingsConfig(batch_size=4))
    assert (cache.encoder, cache.dimension) == (expected, 24)


def test_overflow_in_fp16_names_the_row_and_the_remedy(clip: Publish, images: Publish, encode: Publish) -> None:
    with pytest.raises(WorkFailed, match=r"row 0 \(key 000000000\) is not finite.*precision to bf16 or fp32"):
        encode("embeddings", clip(scale=1e5), images("images", [2]), precision="fp16")


def test_a_zero_vector_is_refused(clip: Publish, images: Publish, encode: Publish) -> None:
    with pytest.raises(WorkFailed, match="is zero"):
        encode("embeddings", clip(scale=0.0), images("images", [2]))


def test_a_picture_that_is_not_the_ledgers_stops_the_shard_and_publishes_nothing(
    clip: Publish, images: Publish, encode: Publish, tmp_path: Path
) -> None:
    images_uri = images("images", [4])
    tar = Artifact.open(images_uri).file("00000000.tar")
    row = stored_rows(Artifact.open(images_uri), 0)[2]
    data = bytearray(tar.read_bytes())
    data[row.offset + 40] ^= 1
    tar.write_bytes(data)
    with pytest.raises(WorkFailed, match=row.key):
        encode("embeddings", clip(), images_uri)
    assert not list((tmp_path / "embeddings").glob("*.parquet"))
    assert not list((tmp_path / "embeddings").glob("receipts/*"))


def test_pandas_reads_the_file_without_us(clip: Publish, images: Publish, encode: Publish) -> None:
    """The documented one-liner: a vector is little-endian float16 bytes."""
    uri = encode("embeddings", clip(), images("images", [3]))
    column = pq.read_table(Path(uri) / "00000000.parquet").column("image_embedding").to_pylist()
    assert np.array_equal(
        np.stack([np.frombuffer(value, "<f2") for value in column]), open_cache(uri).take([0, 1, 2], "image_embedding")
    )
