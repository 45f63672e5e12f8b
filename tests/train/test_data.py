"""Rows and batches, compared with what is drawn and with Pillow's own arithmetic."""

import io
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cluster.artifact import Artifact, Request
from cluster.storage import Folder
from cluster.workshop import begin
from embed.config import PreprocessingConfig
from embed.split import split_of
from embed.tokenizer import Tokenizer
from ingest.scenes import training_scene
from train.data import TrainRows, prefetch, rows_of_images, rows_of_view
from train.family import Needs
from train.lanes import Lanes
from train.pictures import RowCache, decode_square

NEEDS = Needs(frozenset({"image", "tokens"}), image_size=16)


@pytest.fixture
def rows(images: Artifact) -> TrainRows:
    return TrainRows(rows_of_images(images, 0.1), NEEDS, tokenizer=Tokenizer(24))


def test_rows_are_the_ok_ones_outside_the_validation_split(images: Artifact) -> None:
    everything, training = rows_of_images(images, 0.0), rows_of_images(images, 0.1)
    fetched = [row for row in range(100) if row % 10 != 9]
    assert everything.captions(range(len(everything))) == [training_scene(0, row).caption for row in fetched]
    kept = [p for p in everything.pair_ids(range(90)) if split_of(bytes.fromhex(p), 0.1) == "train"]
    assert training.pair_ids(range(len(training))) == kept
    assert training.left_out == 90 - len(kept)


def test_rows_of_a_view_carry_the_vectors_of_their_own_picture(images: Artifact, tmp_path: Path) -> None:
    embeddings, view, included = embedded_and_seen(images, tmp_path)
    table = rows_of_view(view, embeddings, images)
    fetched = [row for row in range(100) if row % 10 != 9]
    kept = [row for row, seen in zip(fetched, included, strict=True) if seen]
    assert table.captions(range(len(table))) == [training_scene(0, row).caption for row in kept]
    assert table.left_out == len(fetched) - len(kept)
    rows = TrainRows(table, Needs(frozenset({"image", "image_embedding", "text_embedding"}), image_size=16))
    batch = rows.batch(np.array([20, 2]))
    assert batch["image_embedding"][:, 0].tolist() == [fetched.index(kept[20]), fetched.index(kept[2])]
    assert torch.equal(batch["text_embedding"], -batch["image_embedding"])
    everything = TrainRows(rows_of_images(images, 0.0), Needs(frozenset({"image"}), image_size=16))
    same = everything.batch(np.array([fetched.index(kept[20])]))
    assert torch.equal(batch["image"][0], same["image"][0])


def embedded_and_seen(images: Artifact, folder: Path) -> tuple[Artifact, Artifact, list[bool]]:
    """Embeddings of two dimensions that spell the row's number, and a view that takes two rows of three."""
    embeddings = begin(Folder(folder / "embeddings"), Request("embeddings", 1, {}, {}), {})
    view = begin(Folder(folder / "view"), Request("view", 1, {}, {}), {})
    included: list[bool] = []
    for shard in range(images.shard_count):
        name = f"{shard:08d}.parquet"
        keys = [r["key"] for r in pq.read_table(images.file(name)).to_pylist() if r["status"] == "ok"]
        first = len(included)
        numbers = np.stack([np.arange(first, first + len(keys)), np.zeros(len(keys))], axis=1).astype("<f2")
        seen = [(first + i) % 3 != 1 for i in range(len(keys))]
        included += seen
        with embeddings.attempt(shard) as attempt:
            columns = {"key": keys, "image_embedding": binary(numbers), "text_embedding": binary(-numbers)}
            pq.write_table(pa.table(columns), attempt.path(name))
            attempt.commit(rows=len(keys), counts={})
        with view.attempt(shard) as attempt:
            split = ["train" if i % 2 or not s else "validation" for i, s in enumerate(seen)]
            included[first:] = [s and part == "train" for s, part in zip(seen, split, strict=True)]
            rows = pa.array(range(len(keys)), pa.int32())
            pq.write_table(pa.table({"row": rows, "included": seen, "split": split}), attempt.path(name))
            attempt.commit(rows=len(keys), counts={})
    return embeddings.publish(images.shard_count), view.publish(images.shard_count), included


def binary(vectors: np.ndarray) -> pa.Array:
    return pa.array([vector.tobytes() for vector in vectors], pa.binary(4))


def test_a_batch_has_the_rows_in_the_order_asked_for(rows: TrainRows) -> None:
    batch = rows.batch(np.array([60, 3, 60]))
    alone = rows.batch(np.array([3]))
    assert batch["image"].shape == (3, 3, 16, 16)
    assert batch["image"].dtype == torch.float32
    assert batch["image"].abs().max() <= 1
    assert torch.equal(batch["image"][1], alone["image"][0])
    assert torch.equal(batch["image"][0], batch["image"][2])
    expected, _ = Tokenizer(24)(rows.table.captions([60, 3]))
    np.testing.assert_array_equal(batch["tokens"][:2].numpy(), expected)


def test_pixels_are_the_same_with_and_without_a_cache(images: Artifact) -> None:
    table, some = rows_of_images(images, 0.1), np.array([0, 5, 70, 5])
    for limit in (0, 16 * 16 * 3 * 6, 1 << 20):
        rows = TrainRows(table, NEEDS, tokenizer=Tokenizer(24), cache_bytes=limit)
        first, second = rows.batch(some)["image"], rows.batch(some)["image"]
        assert torch.equal(first, second)
        assert torch.equal(first, TrainRows(table, NEEDS, tokenizer=Tokenizer(24)).batch(some)["image"])


def test_a_clip_gets_its_own_preprocessing(images: Artifact) -> None:
    preprocessing = PreprocessingConfig(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    needs = Needs(frozenset({"image"}), image_size=32, preprocessing=preprocessing)
    plain = TrainRows(rows_of_images(images, 0.0), Needs(frozenset({"image"}), image_size=32))
    theirs = TrainRows(rows_of_images(images, 0.0), needs)
    torch.testing.assert_close(theirs.batch(np.arange(4))["image"], plain.batch(np.arange(4))["image"])


def test_pictures_are_averaged_down_from_their_centre_square() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    expected = pixels[:, 8:72].reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    assert np.abs(decode_square(data.getvalue(), 16) - expected).max() <= 1


def test_a_cached_row_is_computed_once() -> None:
    cache, computed = RowCache(10, (2,), np.int32, limit_bytes=8 * 4), []

    def compute(row: int) -> np.ndarray:
        computed.append(row)
        return np.array([row, -row])

    for _ in range(2):
        taken = cache.take(np.array([1, 3, 7, 1]), compute)
        np.testing.assert_array_equal(taken, [[1, -1], [3, -3], [7, -7], [1, -1]])
    assert computed == [1, 3, 7, 7]  # four rows fit into the limit: 0 … 3


def test_batches_come_in_the_order_of_the_lanes_from_any_step(rows: TrainRows) -> None:
    lanes, slots = Lanes(rows=len(rows), batch_size=8, seed=1), np.arange(4, 8)
    for step, at, batch in prefetch(rows, lanes, slots, range(3, 9)):
        np.testing.assert_array_equal(at, lanes.at(step, slots).row)
        assert torch.equal(batch["image"], rows.batch(at)["image"])
    assert step == 8


def test_stopping_early_ends_the_thread_and_errors_reach_the_reader(rows: TrainRows) -> None:
    lanes = Lanes(rows=len(rows), batch_size=8, seed=1)
    batches = prefetch(rows, lanes, np.arange(8), range(1_000))
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "batches"]
    with pytest.raises(IndexError):
        next(prefetch(rows, Lanes(rows=10_000, batch_size=8, seed=1), np.arange(8), range(5)))
