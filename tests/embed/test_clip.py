from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from cluster.artifact import Artifact
from cluster.errors import UserError
from embed.clip import (
    ClipEncoder,
    build_clip,
    clip_parameter_count,
    load_encoder,
    normalize_pixels,
    resize_and_crop,
    weights_sha256,
)
from embed.config import EmbeddingsConfig, EncoderConfig, PreprocessingConfig
from embed.description import WEIGHTS_FILE, encoder_digest, read_description

CAPTIONS = ["a small red circle", "a large blue square above a green circle", ""]


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("size", [(50, 70), (32, 32), (31, 100), (20, 20), (33, 32), (301, 97)])
def test_preprocessing_is_open_clips_to_the_last_bit(size: tuple[int, int], resize_mode: str) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    theirs = image_transform_v2(PreprocessCfg(size=32, resize_mode=resize_mode), is_train=False)(image)
    preprocessing = PreprocessingConfig(resize_mode=resize_mode)
    pixels = torch.from_numpy(resize_and_crop(image, 32, preprocessing).copy())
    assert torch.equal(normalize_pixels(pixels[None], preprocessing)[0], theirs)


@pytest.mark.parametrize("custom_text", [False, True])
def test_embeddings_are_those_of_open_clips_own_forward(
    clip: Callable[..., str], tiny_clip: dict[str, Any], custom_text: bool
) -> None:
    encoder = load_encoder(uri := clip(model_cfg={**tiny_clip, "custom_text": custom_text}))
    kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    theirs = kind(**tiny_clip).eval().requires_grad_(False)  # with gradients torch takes other kernels
    theirs.load_state_dict(load_file(Artifact.open(uri).file(WEIGHTS_FILE)))
    pixels_BHWC = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    tokens_BT, _ = encoder.tokenize(CAPTIONS)
    with torch.no_grad():
        image_BD = theirs.encode_image(normalize_pixels(pixels_BHWC, PreprocessingConfig()))
        text_BD = theirs.encode_text(tokens_BT)
    assert torch.equal(encoder.encode_image(pixels_BHWC), image_BD)
    assert torch.equal(encoder.encode_text(tokens_BT), text_BD)


def test_hidden_states_pooled_and_projected_are_the_text_embedding(clip: Callable[..., str]) -> None:
    encoder = load_encoder(uri := clip())
    tokens_BT, _ = encoder.tokenize(CAPTIONS)
    hidden_BTW = encoder.text_hidden(tokens_BT)
    assert hidden_BTW.shape == (3, encoder.context_length, encoder.text_width)
    projection_WD = load_file(Artifact.open(uri).file(WEIGHTS_FILE))["text_projection"]
    pooled_BW = hidden_BTW[torch.arange(3), tokens_BT.argmax(dim=1)]
    torch.testing.assert_close(pooled_BW @ projection_WD, encoder.encode_text(tokens_BT))


@pytest.mark.parametrize(("precision", "closeness"), [("bf16", 0.99), ("fp16", 0.9999)])
def test_low_precision_stays_close_to_fp32(clip: Callable[..., str], precision: str, closeness: float) -> None:
    uri = clip()
    pixels_BHWC = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    exact_BD = load_encoder(uri).encode_image(pixels_BHWC)
    low_BD = load_encoder(uri, precision=precision).encode_image(pixels_BHWC)
    assert low_BD.dtype == torch.float32
    assert torch.cosine_similarity(exact_BD, low_BD).min() > closeness


def test_results_are_inputs_that_training_may_save_for_backward(clip: Callable[..., str]) -> None:
    encoder = load_encoder(clip())
    weight = torch.ones(encoder.text_width, requires_grad=True)
    (encoder.text_hidden(encoder.tokenize(CAPTIONS)[0]) * weight).sum().backward()
    assert weight.grad is not None


def test_weights_hash_ignores_file_format_and_order_but_no_bit(tmp_path: Path, tiny_clip: dict[str, Any]) -> None:
    state = build_clip(tiny_clip).state_dict()
    save_file(state, tmp_path / "a.safetensors")
    torch.save(dict(reversed(state.items())), tmp_path / "b.pt")
    assert weights_sha256(load_file(tmp_path / "a.safetensors")) == weights_sha256(state)
    assert weights_sha256(torch.load(tmp_path / "b.pt", weights_only=True)) == weights_sha256(state)
    changed = {**state, "visual.proj": state["visual.proj"].clone()}
    changed["visual.proj"].view(torch.int32)[0, 0] ^= 1
    assert weights_sha256(changed) != weights_sha256(state)


def test_identity_tells_apart_whatever_shapes_bits(clip: Callable[..., str], tiny_clip: dict[str, Any]) -> None:
    one, other = read_description(clip("one")), read_description(clip("other", seed=1))
    same = read_description(clip("same"))
    default = EmbeddingsConfig()
    assert encoder_digest(one, default) == encoder_digest(same, default)
    squashed = one.model_copy(update={"preprocessing": PreprocessingConfig(resize_mode="squash")})
    digests = {
        encoder_digest(one, default),
        encoder_digest(other, default),
        encoder_digest(squashed, default),
        encoder_digest(one, EmbeddingsConfig(precision="bf16")),
        encoder_digest(one, EmbeddingsConfig(batch_size=32)),
        encoder_digest(one, EmbeddingsConfig(threads=2)),
    }
    assert len(digests) == 6
    assert encoder_digest(one, EmbeddingsConfig(decode_threads=9)) == encoder_digest(one, default)


def test_weights_that_are_not_the_described_ones_are_refused(clip: Callable[..., str]) -> None:
    uri = clip()
    path = Artifact.open(uri).file(WEIGHTS_FILE)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="hash to"):
        load_encoder(uri)


def test_parameters_are_counted_without_building(tiny_clip: dict[str, Any]) -> None:
    counted = clip_parameter_count(EncoderConfig(architecture=tiny_clip))
    assert counted == sum(parameter.numel() for parameter in build_clip(tiny_clip).parameters())
    assert clip_parameter_count(EncoderConfig(architecture="ViT-L-14")) == 427_616_513


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("ViT-Z-99", "unknown architecture 'ViT-Z-99'"),
        ({"embed_dim": 8, "vision_cfg": {}}, "lacks text_cfg"),
        ("roberta-ViT-B-32", "Hugging Face tokenizer"),
        ("coca_ViT-B-32", "CoCa"),
        ("nowhere.json", "does not exist"),
    ],
)
def test_architectures_that_cannot_work_are_refused_by_name(architecture: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EncoderConfig(architecture=architecture)


def test_an_unknown_field_of_a_tower_is_a_users_error(tiny_clip: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="cannot build"):
        build_clip({**tiny_clip, "vision_cfg": {**tiny_clip["vision_cfg"], "wings": 2}})


def test_a_row_has_the_same_bits_wherever_it_stands_in_the_batch(clip: Callable[..., str]) -> None:
    encoder: ClipEncoder = load_encoder(clip())
    pixels_BHWC = torch.randint(0, 256, (16, 32, 32, 3), dtype=torch.uint8)
    order = torch.randperm(16)
    assert torch.equal(encoder.encode_image(pixels_BHWC)[order], encoder.encode_image(pixels_BHWC[order]))
