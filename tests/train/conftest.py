"""Artifacts to train on, drawn from the scene grammar and committed as the real stages commit theirs."""

import hashlib
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.artifact import Artifact, Request
from cluster.storage import Folder
from cluster.workshop import Workshop, begin
from ingest.scenes import draw, training_scene
from ingest.tar import DeterministicTar

TINY_ENCODER: dict[str, Any] = {
    "architecture": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "patch_size": 4, "width": 32, "layers": 1, "head_width": 16},
        "text_cfg": {"context_length": 24, "width": 32, "layers": 1, "heads": 2, "vocab_size": 49408},
    },
    "vocabulary": "captions",
}


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """90 stored scenes of 32 pixels in three shards, and ten rows that were never fetched."""
    return build_images(tmp_path_factory.mktemp("run") / "images", count=100, size=32, shard_rows=40)


@pytest.fixture(scope="session")
def build(images: Artifact) -> Callable[..., dict[str, Any]]:
    """`build(folder, **training)` is a job that trains a tiny CLIP on `images`."""
    return partial(tiny_clip_job, images)


def tiny_clip_job(images: Artifact, folder: Path, **training: Any) -> dict[str, Any]:
    """A payload for `train.worker.member` that trains a tiny CLIP, with its artifact begun at `folder`."""
    defaults = {
        "steps": 12,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "ema_decay": 0.9,
        "checkpoint_every": 4,
    }
    payload = {
        "family": "clip",
        "model": TINY_ENCODER,
        "training": {**defaults, **training},
        "seed": 3,
        "validation_fraction": 0.1,
        "inputs": {"images": images.uri},
    }
    settings = {key: payload[key] for key in ("model", "training", "seed")}
    request = Request("clip", 1, settings, {"images": images.content_digest})
    return {**payload, "out": begin(Folder(folder), request, {}).plain()}


def build_images(folder: Path, *, count: int, size: int, shard_rows: int, unfetched_every: int = 10) -> Artifact:
    """An images artifact of training scenes; every tenth row is `fetch_failed`."""
    workshop = begin(Folder(folder), Request("images", 1, {"count": count, "size": size}, {}), {})
    shards = -(-count // shard_rows)
    for shard in range(shards):
        rows = range(shard * shard_rows, min(count, (shard + 1) * shard_rows))
        _commit_shard(workshop, shard, rows, size, unfetched_every)
    return workshop.publish(shards)


def _commit_shard(workshop: Workshop, shard: int, rows: range, size: int, unfetched_every: int) -> None:
    ledger = []
    with workshop.attempt(shard) as attempt:
        with attempt.path(f"{shard:08d}.tar").open("wb") as file, DeterministicTar(file) as tar:
            for row in rows:
                scene = training_scene(0, row)
                key = f"{shard:05d}{row - rows.start:04d}"
                entry: dict[str, Any] = {
                    "key": key,
                    "pair_id": hashlib.sha256(f"scene {row}".encode()).digest()[:16],
                    "caption": scene.caption,
                    "caption_bytes": None,
                    "status": "fetch_failed",
                    "offset": None,
                    "length": None,
                }
                if row % unfetched_every != unfetched_every - 1:
                    picture = io.BytesIO()
                    draw(scene, size).save(picture, "JPEG", quality=95)
                    data = picture.getvalue()
                    entry |= {"status": "ok", "offset": tar.add(f"{key}.jpg", data), "length": len(data)}
                    tar.add(f"{key}.txt", scene.caption.encode())
                    tar.add(f"{key}.json", json.dumps({"key": key}).encode())
                ledger.append(entry)
        schema = pa.schema(
            [
                ("key", pa.string()),
                ("pair_id", pa.binary(16)),
                ("caption", pa.string()),
                ("caption_bytes", pa.binary()),
                ("status", pa.string()),
                ("offset", pa.int64()),
                ("length", pa.int64()),
            ]
        )
        pq.write_table(pa.Table.from_pylist(ledger, schema=schema), attempt.path(f"{shard:08d}.parquet"))
        ok = sum(entry["status"] == "ok" for entry in ledger)
        attempt.commit(rows=len(ledger), counts={"ok": ok, "fetch_failed": len(ledger) - ok})
