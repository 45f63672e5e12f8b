import numpy as np
import pytest
import torch

from train.draws import Draws
from train.families import decoder as family
from train.families.config import DecoderModelConfig, DiffusionConfig, SamplerConfig, TextConfig, UNetConfig
from train.families.decoder import Decoder, sample_decoder
from train.family import Facts
from train.sample.noise import SeededNoise

FACTS = Facts(dimension=8, text_width=12, context_length=6, vocabulary_size=50, embedding_mean=(0.1,) * 8)
CPU = torch.device("cpu")


def some_decoder(*, learned_variance: bool = False, prediction: str = "v") -> Decoder:
    torch.manual_seed(0)
    config = DecoderModelConfig(
        image_size=16,
        unet=UNetConfig(
            channels=16, channel_multipliers=(1, 2), res_blocks=1, attention_at=(4,), head_channels=16, patch=2
        ),
        text=TextConfig(source="clip_hidden", width=24),
        diffusion=DiffusionConfig(prediction=prediction, learned_variance=learned_variance),
    )
    decoder = family.build(config, FACTS).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.abs().max() == 0:
                parameter.normal_(std=0.05)
    return decoder


def some_captions(count: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(1, 40, (count, 6), generator=torch.Generator().manual_seed(3))
    tokens[:, 4], tokens[:, 5] = 49, 0
    return {"tokens_BT": tokens, "hidden_BTW": torch.randn(count, 6, 12, generator=torch.Generator().manual_seed(4))}


def test_what_is_dropped_leaves_no_trace():
    decoder, captions = some_decoder(), some_captions(2)
    x, step, z = torch.randn(2, 3, 16, 16), torch.tensor([10, 600]), torch.randn(2, 8)
    yes, no = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
    other_captions = [value.flip(0) for value in captions.values()]
    without_image = [decoder(x, step, each, *captions.values(), yes, no) for each in (z, -z)]
    without_text = [decoder(x, step, z, *each, no, yes) for each in (captions.values(), other_captions)]
    torch.testing.assert_close(*without_image)
    torch.testing.assert_close(*without_text)
    assert (without_image[0] - without_text[0]).abs().max() > 1e-4


def test_drops_are_independent_and_as_frequent_as_configured():
    seen: dict[str, list[torch.Tensor]] = {"image": [], "text": []}
    decoder = some_decoder()

    def spy(module, arguments):
        seen["image"].append(arguments[5])
        seen["text"].append(arguments[6])

    decoder.register_forward_pre_hook(spy)
    count = 32
    captions = some_captions(count)
    batch = {"image": torch.zeros(count, 3, 16, 16), "image_embedding": torch.randn(count, 8)}
    batch |= {"tokens": captions["tokens_BT"], "text_hidden": captions["hidden_BTW"]}
    with torch.no_grad():
        for step in range(40):
            family.loss(decoder, batch, Draws(0, step, np.arange(count)))
    image, text = torch.cat(seen["image"]).float(), torch.cat(seen["text"]).float()
    assert abs(image.mean().item() - 0.1) < 0.03
    assert abs(text.mean().item() - 0.5) < 0.05
    assert abs((image * text).mean().item() - 0.05) < 0.02


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
@pytest.mark.parametrize("learned_variance", [True, False])
def test_every_sampler_draws_pixels(method, learned_variance):
    decoder = some_decoder(learned_variance=learned_variance)
    picture = sample_decoder(
        decoder,
        SamplerConfig(steps=4, method=method, guidance_scale=1.5),
        **some_captions(3),
        image_embedding_BD=torch.randn(3, 8),
        noise=SeededNoise([1, 2, 3], "decoder", (3, 16, 16), CPU),
    )
    assert picture.shape == (3, 3, 16, 16) and picture.isfinite().all()
    assert picture.abs().max() <= 1.0001


def test_guidance_of_one_is_the_conditional_model():
    decoder, captions, z = some_decoder(), some_captions(2), torch.randn(2, 8)

    def draw(scale: float) -> torch.Tensor:
        noise = SeededNoise([1, 2], "decoder", (3, 16, 16), CPU)
        config = SamplerConfig(steps=4, guidance_scale=scale)
        return sample_decoder(decoder, config, **captions, image_embedding_BD=z, noise=noise)

    torch.testing.assert_close(draw(1.0), draw(1.000001), rtol=0, atol=1e-4)
    assert (draw(1.0) - draw(4.0)).abs().max() > 1e-3
