"""The decoder: a picture from z_i and the caption (unCLIP §2.1).

GLIDE's U-Net, changed in two ways: z_i is projected and added to the timestep's embedding, and z_i is projected to
`image_tokens` (4) extra context tokens beside the caption's. z_i is dropped in 10% of the steps and the caption in
50%, independently, so that one network serves the full stack, z_i alone and the caption alone, and can be guided.
What is dropped is replaced by learned vectors.

Shapes: B batch, C channels, H W pixels, T caption tokens, D embedding dimension, X context width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from train.diffusion.gaussian import Parameterization, clip_static, guide, q_sample
from train.diffusion.loss import hybrid_loss, simple_loss
from train.diffusion.samplers import Noise, ddim_sample, ddpm_sample
from train.diffusion.schedule import make_schedule, respaced
from train.draws import Draws
from train.families.config import DecoderModelConfig, SamplerConfig
from train.families.facts import embedding_mean
from train.family import Column, Facts, Needs
from train.models.text_encoder import HiddenStateText, TokenText
from train.models.unet import UNet

CONFIG = DecoderModelConfig
PIXELS = 3


class Decoder(nn.Module):
    embedding_mean: Tensor
    embedding_scale: Tensor

    def __init__(self, config: DecoderModelConfig, facts: Facts) -> None:
        super().__init__()
        unet, text = config.unet, config.text
        dimension, context = facts.dimension, facts.context_length
        self.config = config
        self.schedule = make_schedule(config.diffusion.noise_schedule, config.diffusion.timesteps)
        self.unet = UNet(
            image_size=config.image_size,
            in_channels=PIXELS,
            out_channels=PIXELS * (2 if config.diffusion.learned_variance else 1),
            channels=unet.channels,
            channel_multipliers=unet.channel_multipliers,
            res_blocks=unet.res_blocks,
            attention_at=unet.attention_at,
            head_channels=unet.head_channels,
            context_width=text.width,
            dropout=unet.dropout,
            patch=unet.patch,
            positions=unet.positions,
        )
        self.text: HiddenStateText | TokenText = (
            HiddenStateText(context=context, hidden_width=facts.text_width, width=text.width)
            if text.source == "clip_hidden"
            else TokenText(
                vocabulary=facts.vocabulary_size,
                context=context,
                width=text.width,
                depth=text.depth,
                heads=text.heads,
            )
        )
        self.image_tokens = nn.Linear(dimension, config.image_tokens * text.width)
        self.image_condition = nn.Linear(dimension, self.unet.embedding_width)
        self.text_condition = nn.Linear(text.width, self.unet.embedding_width)
        self.norm_context = nn.LayerNorm(text.width)
        self.null_image = nn.Parameter(torch.zeros(dimension))
        self.null_text = nn.Parameter(torch.randn(text.width) * 0.02)
        self.register_buffer("embedding_mean", embedding_mean(facts))
        self.register_buffer("embedding_scale", torch.tensor(facts.embedding_scale))

    def forward(
        self,
        x_BCHW: Tensor,
        timestep_B: Tensor,
        image_embedding_BD: Tensor,
        tokens_BT: Tensor,
        hidden_BTW: Tensor | None,
        image_dropped_B: Tensor,
        text_dropped_B: Tensor,
    ) -> Tensor:
        """The network's answer at x_t, in the config's parameterisation."""
        condition_BE, context_BTX = self.condition(
            image_embedding_BD, tokens_BT, hidden_BTW, image_dropped_B, text_dropped_B
        )
        answer: Tensor = self.unet(x_BCHW, timestep_B, condition_BE=condition_BE, context_BTX=context_BTX)
        return answer

    def condition(
        self,
        image_embedding_BD: Tensor,
        tokens_BT: Tensor,
        hidden_BTW: Tensor | None,
        image_dropped_B: Tensor,
        text_dropped_B: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """What is added to the timestep's embedding, and the context tokens: z_i's first, then the caption's."""
        z_i_BD = (image_embedding_BD - self.embedding_mean) * self.embedding_scale
        z_i_BD = torch.where(image_dropped_B[:, None], self.null_image.to(z_i_BD.dtype), z_i_BD)
        caption_BTX, summary_BX = self.text(tokens_BT, hidden_BTW)
        null_X = self.null_text.to(caption_BTX.dtype)
        caption_BTX = torch.where(text_dropped_B[:, None, None], null_X, caption_BTX)
        summary_BX = torch.where(text_dropped_B[:, None], null_X, summary_BX)
        image_BTX = self.image_tokens(z_i_BD).unflatten(1, (self.config.image_tokens, -1))
        context_BTX = self.norm_context(torch.cat([image_BTX, caption_BTX], dim=1))
        return self.image_condition(z_i_BD) + self.text_condition(summary_BX), context_BTX


def needs(config: DecoderModelConfig) -> Needs:
    text: frozenset[Column] = frozenset({"text_hidden"} if config.text.source == "clip_hidden" else set())
    return Needs(columns=text | {"image", "tokens", "image_embedding"}, image_size=config.image_size)


def build(config: DecoderModelConfig, facts: Facts) -> Decoder:
    return Decoder(config, facts)


def loss(model: Any, batch: Mapping[str, Tensor], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
    """L_simple, or L_hybrid where the variance is learned."""
    config, schedule = model.config, model.schedule
    x_start = batch["image"]
    step_B = draws.integers("timestep", len(schedule))
    noise = draws.normal("noise", tuple(x_start.shape[1:]))
    output = model(
        q_sample(schedule, x_start, step_B, noise),
        step_B,
        batch["image_embedding"].float(),
        batch["tokens"],
        batch.get("text_hidden"),
        draws.uniform("image_drop") < config.image_drop,
        draws.uniform("text_drop") < config.text_drop,
    )
    kind = Parameterization(config.diffusion.prediction)
    if config.diffusion.learned_variance:
        return hybrid_loss(kind, schedule, output, x_start, step_B, noise)
    weight = config.diffusion.max_snr_weight
    return simple_loss(kind, schedule, output, x_start, step_B, noise, max_snr_weight=weight), {}


@torch.no_grad()
def sample_decoder(
    decoder: Decoder,
    config: SamplerConfig,
    *,
    tokens_BT: Tensor,
    hidden_BTW: Tensor | None,
    image_embedding_BD: Tensor | None,
    noise: Noise,
) -> Tensor:
    """Pictures in [−1, 1], (B, 3, H, W). Without an image embedding: from the caption alone."""
    caption_alone = image_embedding_BD is None
    z_i_BD = decoder.embedding_mean.expand(len(tokens_BT), -1) if image_embedding_BD is None else image_embedding_BD
    no_B = torch.zeros(len(tokens_BT), dtype=torch.bool, device=tokens_BT.device)
    condition, context = decoder.condition(z_i_BD, tokens_BT, hidden_BTW, no_B | caption_alone, no_B)
    scale, learned = config.guidance_scale, decoder.config.diffusion.learned_variance
    if scale != 1:
        null = decoder.condition(z_i_BD, tokens_BT, hidden_BTW, ~no_B, ~no_B)
        condition, context = torch.cat([condition, null[0]]), torch.cat([context, null[1]])

    def denoise(x_BCHW: Tensor, timestep_B: Tensor) -> Tensor:
        copies = 1 if scale == 1 else 2
        output: Tensor = decoder.unet(
            x_BCHW.repeat(copies, 1, 1, 1), timestep_B.repeat(copies), condition_BE=condition, context_BTX=context
        )
        if scale == 1:
            return output
        conditional, unconditional = output.chunk(2)
        guided = guide(conditional[:, :PIXELS], unconditional[:, :PIXELS], scale=scale)
        return torch.cat([guided, conditional[:, PIXELS:]], dim=1)  # the variance is not guided (GLIDE's code)

    schedule, kind = respaced(decoder.schedule, config.steps), Parameterization(decoder.config.diffusion.prediction)
    x_T = noise()
    if config.method == "ddpm":
        return ddpm_sample(denoise, x_T, schedule, kind=kind, noise=noise, learned_variance=learned, clip=clip_static)

    def mean_only(x_BCHW: Tensor, timestep_B: Tensor) -> Tensor:
        return denoise(x_BCHW, timestep_B)[:, :PIXELS]

    return ddim_sample(mean_only, x_T, schedule, kind=kind, noise=noise, eta=config.eta, clip=clip_static)
