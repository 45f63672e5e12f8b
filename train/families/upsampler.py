"""An upsampler: ×4 by an unconditional ADM net, convolutions only (unCLIP §2.1).

It sees the noised large picture and, beside it in channels, the small one enlarged. It is trained on crops a quarter of
the large side, and sampled at full size: without attention a net does not know how large its picture is. In
training the small picture is corrupted (first stage: Gaussian blur, kernel 3, sigma 0.6; after SR3), so that what
the model before it gets slightly wrong does not throw it off; in sampling it is taken as it comes.

A net that predicts x_start adds its answer to the enlarged picture: an untrained one is bilinear enlargement.

Shapes: B batch, C channels, h w small pixels, H W large pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.diffusion.gaussian import Parameterization, clip_static, q_sample
from train.diffusion.loss import simple_loss
from train.diffusion.samplers import Noise, ddim_sample, ddpm_sample
from train.diffusion.schedule import make_schedule, respaced
from train.draws import Draws
from train.families.config import SamplerConfig, UpsamplerModelConfig
from train.family import Facts, Needs
from train.models.unet import UNet

CONFIG = UpsamplerModelConfig
PIXELS = 3


class Upsampler(nn.Module):
    def __init__(self, config: UpsamplerModelConfig) -> None:
        super().__init__()
        self.config = config
        self.schedule = make_schedule(config.diffusion.noise_schedule, config.diffusion.timesteps)
        self.unet = UNet(
            image_size=config.crop_size,
            in_channels=2 * PIXELS,
            out_channels=PIXELS,
            channels=config.unet.channels,
            channel_multipliers=config.unet.channel_multipliers,
            res_blocks=config.unet.res_blocks,
            attention_at=config.unet.attention_at,
            head_channels=config.unet.head_channels,
            dropout=config.unet.dropout,
            patch=config.unet.patch,
        )

    def forward(self, x_BCHW: Tensor, timestep_B: Tensor, low_BChw: Tensor) -> Tensor:
        enlarged = F.interpolate(low_BChw, size=x_BCHW.shape[2:], mode="bilinear", align_corners=False)
        answer: Tensor = self.unet(torch.cat([x_BCHW, enlarged], dim=1), timestep_B)
        # Group normalisation takes a flat region's colour away, so x_start is told as a change of the enlarged picture.
        return enlarged + answer if self.config.diffusion.prediction == "x_start" else answer


def needs(config: UpsamplerModelConfig) -> Needs:
    return Needs(columns=frozenset({"image"}), image_size=config.high_size)


def build(config: UpsamplerModelConfig, facts: Facts) -> Upsampler:
    return Upsampler(config)


def loss(model: Any, batch: Mapping[str, Tensor], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
    """L_simple on a random crop."""
    config, schedule = model.config, model.schedule
    x_start = random_crop(batch["image"], config.crop_size, draws)
    low = F.avg_pool2d(x_start, config.high_size // config.low_size)
    if config.corruption == "blur":
        corrupted_B = draws.uniform("corruption") < config.corruption_share
        blurred = gaussian_blur(low, kernel=config.blur_kernel, sigma=config.blur_sigma)
        low = torch.where(corrupted_B[:, None, None, None], blurred, low)
    step_B = draws.integers("timestep", len(schedule))
    noise = draws.normal("noise", tuple(x_start.shape[1:]))
    output = model(q_sample(schedule, x_start, step_B, noise), step_B, low)
    kind = Parameterization(config.diffusion.prediction)
    weight = config.diffusion.max_snr_weight
    return simple_loss(kind, schedule, output, x_start, step_B, noise, max_snr_weight=weight), {}


def random_crop(image_BCHW: Tensor, size: int, draws: Draws) -> Tensor:
    """A square of `size` pixels from a place of each picture's own."""
    height, width = image_BCHW.shape[2:]
    top_B = draws.integers("crop_top", height - size + 1).tolist()
    left_B = draws.integers("crop_left", width - size + 1).tolist()
    return torch.stack(
        [
            image[:, top : top + size, left : left + size]
            for image, top, left in zip(image_BCHW, top_B, left_B, strict=True)
        ]
    )


def gaussian_blur(image_BCHW: Tensor, *, kernel: int, sigma: float) -> Tensor:
    """Separable Gaussian blur, the border mirrored."""
    place = torch.arange(kernel, dtype=torch.float32, device=image_BCHW.device) - kernel // 2
    weights = torch.softmax(-place.square() / (2 * sigma**2), dim=0).to(image_BCHW.dtype)
    channels, pad = image_BCHW.shape[1], kernel // 2
    padded = F.pad(image_BCHW, (pad, pad, pad, pad), mode="reflect")
    rows = F.conv2d(padded, weights.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)
    return F.conv2d(rows, weights.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)


@torch.no_grad()
def sample_upsampler(upsampler: Upsampler, config: SamplerConfig, *, low_BChw: Tensor, noise: Noise) -> Tensor:
    """The large picture in [−1, 1], whatever the small one's size."""

    def denoise(x_BCHW: Tensor, timestep_B: Tensor) -> Tensor:
        output: Tensor = upsampler(x_BCHW, timestep_B, low_BChw)
        return output

    schedule = respaced(upsampler.schedule, config.steps)
    kind = Parameterization(upsampler.config.diffusion.prediction)
    if config.method == "ddpm":
        return ddpm_sample(denoise, noise(), schedule, kind=kind, noise=noise, clip=clip_static)
    return ddim_sample(denoise, noise(), schedule, kind=kind, noise=noise, eta=config.eta, clip=clip_static)
