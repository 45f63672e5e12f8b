"""A small untrained world: clip, caches, view, and models with random weights, published as the stages publish them."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cluster.artifact import Request
from cluster.canonical import canonical_json
from cluster.parquet import write_table
from cluster.settings import Section
from cluster.storage import Folder
from cluster.workshop import Attempt, Workshop, begin
from embed.clip import build_clip, save_encoder
from embed.config import PreprocessingConfig
from embed.encode import Vectors, embeddings_table
from embed.stored_rows import StoredRow
from embed.view import view_table
from ingest.scenes import heldout_caption_scene, training_scene
from train.families.config import (
    DecoderModelConfig,
    DiffusionConfig,
    PriorModelConfig,
    SamplerConfig,
    SamplesConfig,
    TextConfig,
    UNetConfig,
    UpsamplerModelConfig,
)
from train.family import Facts, family_of

CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 24, "width": 32, "layers": 1, "heads": 2, "vocab_size": 49408},
}
FACTS = Facts(dimension=16, text_width=32, context_length=24, vocabulary_size=49408, embedding_mean=(0.0,) * 16)
V = DiffusionConfig(prediction="v")


def unet(**settings: Any) -> UNetConfig:
    return UNetConfig(channels=16, channel_multipliers=(1, 2), res_blocks=1, head_channels=16, **settings)


MODELS: dict[str, tuple[str, Section]] = {
    "prior": ("prior_diffusion", PriorModelConfig(width=32, depth=1, heads=2, text="clip_hidden")),
    "decoder": (
        "decoder",
        DecoderModelConfig(
            image_size=16,
            unet=unet(patch=2, attention_at=(4,), positions=True),
            text=TextConfig(source="clip_hidden", width=16),
            diffusion=V,
        ),
    ),
    "upsampler_256": (
        "upsampler",
        UpsamplerModelConfig(low_size=16, high_size=32, unet=unet(patch=2), crop_fraction=0.5, diffusion=V),
    ),
    "upsampler_1024": (
        "upsampler",
        UpsamplerModelConfig(low_size=32, high_size=64, unet=unet(patch=4), crop_fraction=0.5, diffusion=V),
    ),
}
SAMPLES = SamplesConfig(
    captions=6,
    shown=4,
    batch_size=4,
    prior=SamplerConfig(steps=4, method="ddpm"),
    decoder=SamplerConfig(steps=4, method="ddpm", guidance_scale=1.5),
    upsampler_256=SamplerConfig(steps=2),
    upsampler_1024=SamplerConfig(steps=2, eta=0.5),
)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """URIs by artifact, as a run hands them to its samples stage."""
    folder = tmp_path_factory.mktemp("world")
    training = [training_scene(0, index).caption for index in range(80)]
    heldout = [heldout_caption_scene(0, index, training_count=80).caption for index in range(20)]
    uris = {
        "clip": _publish_clip(folder / "clip"),
        "embeddings": publish_cache(folder / "embeddings", training),
        "evaluation/heldout/embeddings": publish_cache(folder / "evaluation/heldout/embeddings", heldout),
        "view": _publish_view(folder / "view", training),
    }
    return uris | {name: _publish_model(folder / name, family, config) for name, (family, config) in MODELS.items()}


def publish_cache(folder: Path, captions: Sequence[str]) -> str:
    generator = np.random.default_rng(len(captions))
    image, text = (generator.normal(size=(len(captions), 16)).astype(np.float32) for _ in range(2))
    rows = [
        StoredRow(_pair_id(caption, row), f"{row:09d}", None, "pairs.parquet", caption, None, "00", 0, 0)
        for row, caption in enumerate(captions)
    ]
    with (workshop := _begin(folder, "embeddings")).attempt(0) as attempt:
        write_table(
            attempt.path("00000000.parquet"), embeddings_table(rows, Vectors(rows, image, text, 0), encoder="a")
        )
        attempt.commit(rows=len(captions), counts={"ok": len(captions)})
    return workshop.publish(1).uri


def _publish_view(folder: Path, captions: Sequence[str]) -> str:
    with (workshop := _begin(folder, "view")).attempt(0) as attempt:
        pair_ids = [_pair_id(caption, row) for row, caption in enumerate(captions)]
        table, counts = view_table(pair_ids, {}, 0.2)
        write_table(attempt.path("00000000.parquet"), table)
        attempt.commit(rows=len(captions), counts=counts)
    return workshop.publish(1).uri


def _publish_clip(folder: Path) -> str:
    torch.manual_seed(0)
    with (workshop := _begin(folder, "clip")).attempt(0) as attempt:
        save_encoder(
            build_clip(CLIP).state_dict(),
            weights_path=attempt.path("model.safetensors"),
            encoder_path=attempt.path("encoder.json"),
            model_cfg=CLIP,
            vocabulary=None,
            preprocessing=PreprocessingConfig(),
            made={"by": "test"},
        )
        attempt.commit(rows=1, counts={"ok": 1})
    return workshop.publish(1).uri


def _publish_model(folder: Path, family: str, config: Section) -> str:
    torch.manual_seed(1)
    model = family_of(family).build(config, FACTS)
    _stir(model)
    with (workshop := _begin(folder, family)).attempt(0) as attempt:
        _write_model(attempt, model, family, config)
    return workshop.publish(1).uri


def _write_model(attempt: Attempt, model: nn.Module, family: str, config: Section) -> None:
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, attempt.path("model.safetensors")
    )
    described = {"family": family, "model": config.model_dump(mode="json"), "facts": dataclasses.asdict(FACTS)}
    attempt.path("config.json").write_bytes(canonical_json(described))
    attempt.commit(rows=1, counts={})


def _stir(model: nn.Module) -> None:
    """Zero-initialised layers would hide what they depend on."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() == 0:
                parameter.normal_(std=0.05)


def _begin(folder: Path, kind: str) -> Workshop:
    return begin(Folder(folder), Request(kind, 1, {}, {}), {})


def _pair_id(caption: str, row: int) -> bytes:
    return hashlib.sha256(f"{row}:{caption}".encode()).digest()[:16]
