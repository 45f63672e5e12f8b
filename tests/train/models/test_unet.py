import pytest
import torch
from torch import nn

from train.models.unet import AttentionBlock, ResBlock, UNet


def small_unet(**changes) -> UNet:
    torch.manual_seed(0)
    settings = {
        "image_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "channels": 32,
        "channel_multipliers": (1, 2),
        "res_blocks": 1,
        "attention_at": (8,),
        "head_channels": 16,
        "context_width": 24,
    }
    return UNet(**{**settings, **changes})


def awake(model: nn.Module) -> nn.Module:
    """A model whose zero-initialised layers have learned something."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() == 0:
                parameter.normal_(std=0.1)
    return model.eval()


@pytest.mark.parametrize("patch", [1, 2])
def test_an_untrained_net_answers_zero(patch):
    model = small_unet(patch=patch, attention_at=(8, 4))
    answer = model(torch.randn(2, 3, 16, 16), torch.tensor([3, 900]), context_BTX=torch.randn(2, 5, 24))
    assert answer.shape == (2, 3, 16, 16)
    assert answer.abs().max() == 0


def test_an_untrained_branch_is_the_identity():
    x = torch.randn(2, 32, 8, 8)
    torch.testing.assert_close(ResBlock(32, 32, 16, dropout=0.0)(x, torch.randn(2, 16)), x)
    torch.testing.assert_close(AttentionBlock(32, head_channels=16, context_width=None)(x, None), x)


@pytest.mark.parametrize("what", ["timestep", "condition", "context"])
def test_the_answer_depends_on(what):
    model = awake(small_unet())
    x = torch.randn(1, 3, 16, 16)
    timestep, condition, context = torch.tensor([10]), torch.zeros(1, 128), torch.zeros(1, 5, 24)
    before = model(x, timestep, condition_BE=condition, context_BTX=context)
    if what == "timestep":
        timestep = torch.tensor([700])
    elif what == "condition":
        condition = condition + 1
    else:
        context = context + 1
    after = model(x, timestep, condition_BE=condition, context_BTX=context)
    assert (before - after).abs().max() > 1e-3


def test_context_tokens_are_a_set():
    """Extra keys and values have no order of their own: positions are the text encoder's business."""
    model = awake(small_unet())
    x, context = torch.randn(1, 3, 16, 16), torch.randn(1, 5, 24)
    forwards, backwards = (model(x, torch.tensor([10]), context_BTX=c) for c in (context, context.flip(1)))
    torch.testing.assert_close(forwards, backwards, rtol=1e-4, atol=1e-5)


def test_a_net_of_convolutions_takes_any_size_that_divides():
    model = awake(small_unet(attention_at=(), context_width=None, patch=2))
    assert model(torch.randn(1, 3, 48, 24), torch.tensor([5])).shape == (1, 3, 48, 24)
    with pytest.raises(ValueError, match="sides must divide by 4"):
        model(torch.randn(1, 3, 18, 18), torch.tensor([5]))


def test_a_picture_that_cannot_be_halved_often_enough_is_named():
    with pytest.raises(ValueError, match="image_size 12 cannot be divided by 8"):
        small_unet(image_size=12, channel_multipliers=(1, 1, 1, 1))


def test_every_parameter_learns():
    model = awake(small_unet(patch=2, attention_at=(8, 4))).train()
    answer = model(
        torch.randn(2, 3, 16, 16),
        torch.tensor([10, 20]),
        condition_BE=torch.randn(2, 128),
        context_BTX=torch.randn(2, 5, 24),
    )
    answer.square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
