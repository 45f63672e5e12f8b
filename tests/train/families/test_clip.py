"""CLIP's loss against open_clip's own, and the two places where ours differs on purpose."""

import numpy as np
import pytest
import torch
from open_clip.loss import ClipLoss
from torch import Tensor, nn

from embed.config import EncoderConfig
from train.draws import Draws
from train.families import clip
from train.family import Facts

ENCODER = EncoderConfig.model_validate(
    {
        "architecture": {
            "embed_dim": 8,
            "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
            "text_cfg": {"context_length": 6, "width": 16, "layers": 1, "heads": 2},
        }
    }
)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return clip.build(ENCODER, Facts(vocabulary_size=40))


def batch_of(tokens: list[list[int]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"image": torch.randn(len(tokens), 3, 16, 16, generator=generator), "tokens": torch.tensor(tokens)}


def test_loss_is_that_of_open_clip_where_captions_differ(model: nn.Module) -> None:
    batch = batch_of([[38, 3 + i, 5, 39, 0, 0] for i in range(7)])
    ours, _ = clip.loss(model, batch, Draws(0, 0, np.arange(7)))
    image, text, scale = model(batch["image"], batch["tokens"])
    torch.testing.assert_close(ours, ClipLoss()(image, text, scale))


def test_rows_of_one_caption_are_no_negatives(model: nn.Module) -> None:
    captions = [[38, 3 + i, 5, 39, 0, 0] for i in (0, 1, 1)]
    batch = batch_of(captions)
    ours, _ = clip.loss(model, batch, Draws(0, 0, np.arange(3)))
    image, text, scale = model(batch["image"], batch["tokens"])
    logits = scale * image @ text.T
    kept = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    terms = [
        -(torch.log_softmax(matrix[row][kept[row]], dim=0)[int(kept[row][:row].sum())])
        for matrix in (logits, logits.T)
        for row in range(3)
    ]
    torch.testing.assert_close(ours, torch.stack(terms).mean())


def test_temperature_is_clamped_at_100_and_finds_its_way_back() -> None:
    for start, push, passes in ((120.0, -1.0, 0.0), (120.0, 1.0, 1.0), (50.0, -1.0, -1.0)):
        scale = torch.tensor(start, requires_grad=True)
        clamped = clip.clamp_keeping_way_back(scale)
        assert float(clamped.detach()) == min(start, 100.0)
        (push * clamped).backward()
        assert scale.grad is not None
        assert float(scale.grad) == passes


def test_published_weights_have_the_shapes_of_open_clip(model: nn.Module) -> None:
    published = clip.published(model.state_dict())
    assert published["logit_scale"].shape == ()
    assert published.keys() == model.state_dict().keys()
