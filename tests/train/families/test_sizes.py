"""Table 3 of the paper: its dimensions give its numbers of parameters."""

import pytest

from train.families.config import DecoderModelConfig, PriorModelConfig, UNetConfig, UpsamplerModelConfig
from train.families.facts import parameter_count
from train.family import Facts

PAPER = Facts(dimension=1024, text_width=1024, context_length=256, vocabulary_size=49_408)


@pytest.mark.parametrize(
    ("family", "config", "low", "high"),
    [
        ("prior_diffusion", PriorModelConfig(), 1.2e9, 1.35e9),
        ("decoder", DecoderModelConfig(), 3.4e9, 3.6e9),
        (
            "upsampler",
            UpsamplerModelConfig(low_size=64, high_size=256, unet=UNetConfig(channels=320, dropout=0.1)),
            692e6,
            731e6,
        ),
        (
            "upsampler",
            UpsamplerModelConfig(
                low_size=256,
                high_size=1024,
                unet=UNetConfig(channels=192, res_blocks=2, channel_multipliers=(1, 1, 2, 2, 4, 4)),
            ),
            267e6,
            283e6,
        ),
    ],
)
def test_default_models_have_the_papers_size(family, config, low, high):
    assert low <= parameter_count(family, config, PAPER) <= high


def test_an_upsamplers_crop_must_fit_its_net():
    with pytest.raises(ValueError, match="a crop of 12 pixels"):
        UpsamplerModelConfig(low_size=12, high_size=48, unet=UNetConfig(channels=32))
