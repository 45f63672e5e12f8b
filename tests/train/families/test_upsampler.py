import numpy as np
import torch
from torchvision.transforms.functional import gaussian_blur as torchvision_blur

from train.draws import Draws
from train.families import upsampler as family
from train.families.config import DiffusionConfig, SamplerConfig, UNetConfig, UpsamplerModelConfig
from train.families.upsampler import gaussian_blur, random_crop, sample_upsampler
from train.family import Facts
from train.sample.noise import SeededNoise

CONFIG = UpsamplerModelConfig(
    low_size=8,
    high_size=32,
    unet=UNetConfig(channels=16, channel_multipliers=(1,), res_blocks=1, patch=2),
    diffusion=DiffusionConfig(prediction="x_start"),
)


def test_blur_agrees_with_torchvision():
    picture = torch.rand(2, 3, 9, 9)
    torch.testing.assert_close(
        gaussian_blur(picture, kernel=3, sigma=0.6), torchvision_blur(picture, [3, 3], [0.6, 0.6])
    )


def test_crops_are_windows_of_their_pictures():
    pictures = torch.arange(4 * 3 * 32 * 32, dtype=torch.float32).view(4, 3, 32, 32)
    crops = random_crop(pictures, 8, Draws(0, 5, np.arange(4)))
    for crop, picture in zip(crops, pictures, strict=True):
        top, left = divmod(int(crop[0, 0, 0] - picture[0, 0, 0]), 32)
        assert torch.equal(crop, picture[:, top : top + 8, left : left + 8])


def test_an_untrained_net_that_predicts_x_start_is_bilinear_enlargement():
    low = torch.rand(2, 3, 8, 8)
    answer = family.build(CONFIG, Facts())(torch.randn(2, 3, 32, 32), torch.tensor([0, 999]), low)
    torch.testing.assert_close(answer, torch.nn.functional.interpolate(low, scale_factor=4, mode="bilinear"))


def test_training_sees_crops_and_sampling_any_size():
    torch.manual_seed(0)
    upsampler = family.build(CONFIG, Facts())
    shapes = []
    upsampler.register_forward_pre_hook(lambda module, arguments: shapes.append(arguments[0].shape))
    loss, _ = family.loss(upsampler, {"image": torch.rand(2, 3, 32, 32)}, Draws(0, 0, np.arange(2)))
    loss.backward()
    assert shapes == [(2, 3, 8, 8)]
    noise = SeededNoise([1], "upsampler", (3, 32, 48), torch.device("cpu"))
    config = SamplerConfig(steps=2)
    picture = sample_upsampler(upsampler, config, low_BChw=torch.rand(1, 3, 8, 12), noise=noise)
    assert picture.shape == (1, 3, 32, 48)
