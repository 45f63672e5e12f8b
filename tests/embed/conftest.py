"""Small real artifacts: a tiny CLIP, images shards with a ledger, caches with chosen vectors."""

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from cluster.artifact import Artifact, Request
from cluster.environment import environment
from cluster.parquet import write_table
from cluster.storage import Folder
from cluster.workshop import Workshop, begin
from embed.clip import build_clip, save_encoder
from embed.config import PreprocessingConfig
from embed.description import ENCODER_FILE, WEIGHTS_FILE
from embed.encode import EmbeddingsWorker, Vectors, embeddings_table
from embed.stored_rows import StoredRow
from ingest.ledger import ledger_table, row_key
from ingest.outcome import Outcome, Status
from ingest.tar import DeterministicTar

TINY_CLIP: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 12, "width": 32, "heads": 2, "layers": 2},
}
WORDS = ["red", "green", "blue", "small", "large", "circle", "square", "above", "below", "a"]


@pytest.fixture(scope="session")
def tiny_clip() -> dict[str, Any]:
    return TINY_CLIP


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


def start(folder: Path, kind: str) -> Workshop:
    return begin(Folder(folder), Request(kind, 1, {}, {}), environment())


@pytest.fixture
def workshop(tmp_path: Path) -> Callable[[str, str], Workshop]:
    """An empty artifact of a name and a kind."""
    return lambda name, kind: start(tmp_path / name, kind)


def publish_clip(folder: Path, *, seed: int = 0, model_cfg: dict[str, Any] = TINY_CLIP, scale: float = 1.0) -> str:
    torch.manual_seed(seed)
    model = build_clip(model_cfg)
    state = {name: tensor * scale if name == "visual.proj" else tensor for name, tensor in model.state_dict().items()}
    workshop = start(folder, "clip")
    with workshop.attempt(0) as attempt:
        save_encoder(
            state,
            weights_path=attempt.path(WEIGHTS_FILE),
            encoder_path=attempt.path(ENCODER_FILE),
            model_cfg=model_cfg,
            vocabulary=None,
            preprocessing=PreprocessingConfig(),
            made={"by": "test"},
        )
        attempt.commit(rows=1, counts={"ok": 1})
    return workshop.publish(1).uri


@pytest.fixture
def clip(tmp_path: Path) -> Callable[..., str]:
    """Publish a tiny CLIP with random weights; its URI."""
    return lambda name="clip", **options: publish_clip(tmp_path / name, **options)


def picture(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    data = io.BytesIO()
    coarse.resize((50, 40), Image.Resampling.NEAREST).save(data, "PNG")
    return data.getvalue()


def caption(seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, size=5))


def publish_images(folder: Path, shard_rows: Sequence[int], *, first: int = 0, lost: Sequence[int] = ()) -> str:
    """An images artifact of given rows a shard; `lost` are row numbers (over all shards) that could not be fetched."""
    workshop = start(folder, "images")
    number = 0
    for shard, count in enumerate(shard_rows):
        keys, outcomes, pairs = [], [], []
        with workshop.attempt(shard) as attempt:
            with open(attempt.path(f"{shard:08d}.tar"), "wb") as file, DeterministicTar(file) as tar:
                for row in range(count):
                    seed = first + number
                    keys.append(row_key(shard, row, 1000))
                    url = f"http://pictures.test/{seed}.png"
                    pairs.append((url, caption(seed), hashlib.sha256(url.encode()).digest()[:16]))
                    data, sha256 = picture(seed), hashlib.sha256(picture(seed)).hexdigest()
                    if number in lost:
                        outcomes.append(Outcome(Status.FETCH_FAILED, "http_404"))
                    else:
                        offset = tar.add(f"{keys[-1]}.png", data)
                        outcomes.append(
                            Outcome(Status.OK, None, sha256, sha256, 50, 40, 50, 40, offset=offset, length=len(data))
                        )
                    number += 1
            table = pa.table(
                {
                    "source_file": pa.array(["pairs.parquet"] * count, pa.string()),
                    "source_row": pa.array(range(count), pa.int64()),
                    "pair_id": pa.array([pair[2] for pair in pairs], pa.binary(16)),
                    "url": pa.array([pair[0] for pair in pairs], pa.string()),
                    "caption": pa.array([pair[1] for pair in pairs], pa.string()),
                    "url_bytes": pa.array([None] * count, pa.binary()),
                    "caption_bytes": pa.array([None] * count, pa.binary()),
                }
            )
            write_table(attempt.path(f"{shard:08d}.parquet"), ledger_table(table, keys, outcomes))
            attempt.commit(rows=count, counts={"ok": sum(outcome.status == "ok" for outcome in outcomes)})
    return workshop.publish(len(shard_rows)).uri


@pytest.fixture
def images(tmp_path: Path) -> Callable[..., str]:
    """Publish an images artifact: `images(name, rows by shard, first=, lost=)`; its URI."""
    return lambda name, shard_rows, **options: publish_images(tmp_path / name, shard_rows, **options)


@pytest.fixture
def encode(tmp_path: Path) -> Callable[..., str]:
    """Run the embeddings stage over every shard, in a given order; the cache's URI."""

    return lambda name, clip_uri, images_uri, **options: encode_images(tmp_path / name, clip_uri, images_uri, **options)


def encode_images(
    folder: Path, clip_uri: str, images_uri: str, *, order: Sequence[int] | None = None, **config: Any
) -> str:
    out = start(folder, "embeddings")
    shards = Artifact.open(images_uri).shard_count
    worker = EmbeddingsWorker(clip=clip_uri, config={"batch_size": 4, **config})
    worker.setup()
    for shard in order if order is not None else range(shards):
        worker.process({"shard": shard, "images": images_uri, "out": out.plain(), "made_from": "x"})
    return out.publish(shards).uri


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A clean run, shared and never changed: `clip`, `other_clip`, `images` (9 and 6 ok rows) and their `cache`."""
    folder = tmp_path_factory.mktemp("clean")
    clip, images = publish_clip(folder / "clip"), publish_images(folder / "images", [10, 6], lost=[2])
    other = publish_clip(folder / "other_clip", seed=7)
    return {
        "clip": clip,
        "other_clip": other,
        "images": images,
        "cache": encode_images(folder / "cache", clip, images),
    }


def stored_row(index: int, shard: int) -> StoredRow:
    key = row_key(shard, index, 1000)
    pair_id = hashlib.sha256(key.encode()).digest()[:16]
    return StoredRow(pair_id, key, None, "pairs.parquet", caption(index), None, "00", 0, 0)


@pytest.fixture
def cache(tmp_path: Path) -> Callable[..., str]:
    """Publish a cache of given vectors, a list of (image_ND, text_ND) by shard; its URI."""

    def publish(name: str, shards: Sequence[tuple[np.ndarray, np.ndarray]], encoder: str = "one encoder") -> str:
        out = start(tmp_path / name, "embeddings")
        for shard, (image_ND, text_ND) in enumerate(shards):
            rows = [stored_row(index, shard) for index in range(len(image_ND))]
            vectors = Vectors(rows, image_ND.astype(np.float32), text_ND.astype(np.float32), 0)
            with out.attempt(shard) as attempt:
                table = embeddings_table(rows, vectors, encoder=encoder)
                write_table(attempt.path(f"{shard:08d}.parquet"), table, compression="none")
                attempt.commit(rows=len(rows), counts={"ok": len(rows)})
        return out.publish(len(shards)).uri

    return publish
