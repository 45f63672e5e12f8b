"""The diffusion prior: a CLIP image embedding from a caption (unCLIP §2.2).

    sequence   [ caption tokens | z_t | timestep | noised z_i | query ]        causal; the query's output is ẑ_i
    loss       E ‖f(z_i^(t), t, y) − z_i‖²                                     x_start prediction, plain MSE

Embeddings are standardised, (z − mean) · scale with the pca artifact's numbers, so that noise of unit variance meets
data of unit variance (the paper's factor 17.2 does this for its CLIP). Guidance needs a model without text: with
`text_drop` the caption and z_t go *together*, replaced by learned vectors: z_t alone would give the caption away.

In sampling everything before the timestep token is the same at all steps: its keys and values are computed once.

Shapes: B batch, T caption tokens, D embedding dimension, C width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from train.diffusion.gaussian import Parameterization, guide, q_sample
from train.diffusion.loss import simple_loss
from train.diffusion.samplers import Noise, ddim_sample, ddpm_sample
from train.diffusion.schedule import make_schedule, respaced
from train.draws import Draws
from train.families.config import PriorModelConfig, SamplerConfig
from train.families.facts import embedding_mean
from train.family import Column, Facts, Needs
from train.models.embeddings import timestep_embedding
from train.models.text_encoder import HiddenStateText, TokenText
from train.models.transformer import KeysValues, Transformer

CONFIG = PriorModelConfig
TAIL = 3  # timestep, noised z_i, query


class DiffusionPrior(nn.Module):
    embedding_mean: Tensor
    embedding_scale: Tensor

    def __init__(self, config: PriorModelConfig, facts: Facts) -> None:
        super().__init__()
        width, dimension, context = config.width, facts.dimension, facts.context_length
        self.config = config
        self.schedule = make_schedule(config.diffusion.noise_schedule, config.diffusion.timesteps)
        self.text: HiddenStateText | TokenText = (
            HiddenStateText(context=context, hidden_width=facts.text_width, width=width)
            if config.text == "clip_hidden"
            else TokenText(vocabulary=facts.vocabulary_size, context=context, width=width, depth=0, heads=1)
        )
        self.text_embedding = nn.Linear(dimension, width)
        self.noised_embedding = nn.Linear(dimension, width)
        self.timestep = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.query = nn.Parameter(torch.randn(width) * 0.02)
        self.position = nn.Parameter(torch.randn(TAIL + 1, width) * 0.02)
        self.null_prefix = nn.Parameter(torch.randn(context + 1, width) * 0.02)
        self.transformer = Transformer(
            width=width, depth=config.depth, heads=config.heads, causal=True, dropout=config.dropout
        )
        self.answer = nn.Linear(width, dimension)
        self.register_buffer("embedding_mean", embedding_mean(facts))
        self.register_buffer("embedding_scale", torch.tensor(facts.embedding_scale))

    def standardise(self, embedding_BD: Tensor) -> Tensor:
        return (embedding_BD - self.embedding_mean) * self.embedding_scale

    def destandardise(self, standardised_BD: Tensor) -> Tensor:
        return standardised_BD / self.embedding_scale + self.embedding_mean

    def prefix(
        self,
        tokens_BT: Tensor,
        hidden_BTW: Tensor | None,
        text_embedding_BD: Tensor,
        text_dropped_B: Tensor | None = None,
    ) -> Tensor:
        """Caption and z_t as tokens, or the learned null in their place, (B, T+1, C)."""
        caption_BTC, _ = self.text(tokens_BT, hidden_BTW)
        z_t_BC = self.text_embedding(self.standardise(text_embedding_BD)) + self.position[0]
        prefix_BPC = torch.cat([caption_BTC, z_t_BC[:, None]], dim=1)
        if text_dropped_B is None:
            return prefix_BPC
        return torch.where(text_dropped_B[:, None, None], self.null_prefix.to(prefix_BPC.dtype), prefix_BPC)

    def tail(self, z_i_noised_BD: Tensor, timestep_B: Tensor) -> Tensor:
        """The three tokens that change from step to step, (B, 3, C)."""
        time_BC = self.timestep(timestep_embedding(timestep_B, self.query.shape[0]).to(self.query.dtype))
        tokens = [time_BC, self.noised_embedding(z_i_noised_BD), self.query.expand_as(time_BC)]
        return torch.stack(tokens, dim=1) + self.position[1:]

    def forward(
        self,
        tokens_BT: Tensor,
        hidden_BTW: Tensor | None,
        text_embedding_BD: Tensor,
        z_i_noised_BD: Tensor,
        timestep_B: Tensor,
        text_dropped_B: Tensor | None = None,
    ) -> Tensor:
        """ẑ_i, standardised, (B, D)."""
        prefix_BPC = self.prefix(tokens_BT, hidden_BTW, text_embedding_BD, text_dropped_B)
        output, _ = self.transformer(torch.cat([prefix_BPC, self.tail(z_i_noised_BD, timestep_B)], dim=1))
        answer: Tensor = self.answer(output[:, -1])
        return answer

    def past(self, prefix_BPC: Tensor) -> list[KeysValues]:
        """Keys and values of a prefix: the mask is causal, so no step changes them."""
        present: list[KeysValues]
        _, present = self.transformer(prefix_BPC)
        return present

    def continued(self, past: list[KeysValues], z_i_noised_BD: Tensor, timestep_B: Tensor) -> Tensor:
        """`forward` after a prefix whose keys and values are known."""
        output, _ = self.transformer(self.tail(z_i_noised_BD, timestep_B), past)
        answer: Tensor = self.answer(output[:, -1])
        return answer


def needs(config: PriorModelConfig) -> Needs:
    text: frozenset[Column] = frozenset({"text_hidden"} if config.text == "clip_hidden" else set())
    return Needs(columns=text | {"tokens", "image_embedding", "text_embedding"})


def build(config: PriorModelConfig, facts: Facts) -> DiffusionPrior:
    return DiffusionPrior(config, facts)


def loss(model: Any, batch: Mapping[str, Tensor], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
    """MSE of ẑ_i, standardised."""
    z_i_BD = model.standardise(batch["image_embedding"].float())
    step_B = draws.integers("timestep", len(model.schedule))
    noise_BD = draws.normal("noise", tuple(z_i_BD.shape[1:]))
    predicted_BD = model(
        batch["tokens"],
        batch.get("text_hidden"),
        batch["text_embedding"].float(),
        q_sample(model.schedule, z_i_BD, step_B, noise_BD),
        step_B,
        draws.uniform("text_drop") < model.config.text_drop,
    )
    return simple_loss(Parameterization.X_START, model.schedule, predicted_BD, z_i_BD, step_B, noise_BD), {}


@torch.no_grad()
def sample_prior(
    prior: DiffusionPrior,
    config: SamplerConfig,
    *,
    tokens_BT: Tensor,
    hidden_BTW: Tensor | None,
    text_embedding_BD: Tensor,
    noises: list[Noise],
) -> Tensor:
    """z_i of each caption, unit length: of one draw a noise source the one with the larger z_i·z_t (unCLIP §2.2).

    Each of `noises` is a source of (B, D) noise.
    """
    past = prior.past(prior.prefix(tokens_BT, hidden_BTW, text_embedding_BD))
    null_past: list[KeysValues] | None = None
    if config.guidance_scale != 1:
        everywhere = torch.ones(len(tokens_BT), dtype=torch.bool, device=tokens_BT.device)
        null_past = prior.past(prior.prefix(tokens_BT, hidden_BTW, text_embedding_BD, everywhere))

    def denoise(z_noised_BD: Tensor, timestep_B: Tensor) -> Tensor:
        z_i_BD = prior.continued(past, z_noised_BD, timestep_B)
        if null_past is None:
            return z_i_BD
        return guide(z_i_BD, prior.continued(null_past, z_noised_BD, timestep_B), scale=config.guidance_scale)

    schedule = respaced(prior.schedule, config.steps)
    best_BD, best_B = text_embedding_BD, torch.full((len(tokens_BT),), -torch.inf, device=tokens_BT.device)
    for noise in noises:
        kind = Parameterization.X_START
        if config.method == "ddpm":
            sampled_BD = ddpm_sample(denoise, noise(), schedule, kind=kind, noise=noise)
        else:
            sampled_BD = ddim_sample(denoise, noise(), schedule, kind=kind, noise=noise, eta=config.eta)
        z_i_BD = nn.functional.normalize(prior.destandardise(sampled_BD), dim=1)
        fit_B = (z_i_BD * text_embedding_BD).sum(dim=1)
        best_BD = torch.where((fit_B > best_B)[:, None], z_i_BD, best_BD)
        best_B = torch.maximum(fit_B, best_B)
    return best_BD
