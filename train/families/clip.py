"""CLIP, trained here: pictures and captions that belong together find each other in a batch (CLIP §2.3).

The model is open_clip's, so that the artifact is read by the same code as a published one. The loss is the symmetric
InfoNCE over the *global* batch: every rank gathers all features, with gradient, and computes the same loss, so that it
does not depend on the number of processes. DeepSpeed averages gradients over W ranks, and the gather's backward sums
the W equal losses' gradients: both together leave the gradient of one loss over the whole batch.

Rows of one caption are no negatives of each other: which of them is meant cannot be told, and small grammars repeat.

Shapes: B rows of this process, G rows of the global batch, D embedding dimension, T tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import UserError
from embed.architecture import image_size, with_vocabulary_size
from embed.clip import build_clip
from embed.config import EncoderConfig, PreprocessingConfig
from train.draws import Draws
from train.family import Facts, Needs
from train.gather import gather_rows

CONFIG = EncoderConfig
MAX_LOGIT_SCALE = 100.0


def needs(config: EncoderConfig) -> Needs:
    size, _ = image_size(config.model_cfg())
    return Needs(
        frozenset({"image", "tokens"}), image_size=size, preprocessing=preprocessing_of(config), whole_batch=True
    )


def preprocessing_of(config: EncoderConfig) -> PreprocessingConfig:
    return config.preprocessing or PreprocessingConfig()


def build(config: EncoderConfig, facts: Facts) -> nn.Module:
    if not facts.vocabulary_size:
        raise UserError("a CLIP is built for a vocabulary; its size is missing from the facts")
    model: Any = build_clip(with_vocabulary_size(config.model_cfg(), facts.vocabulary_size))
    # DeepSpeed cannot broadcast a parameter without a dimension; `published` takes it away again.
    model.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(1))
    trained: nn.Module = model
    return trained


def published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict as open_clip has it."""
    return {name: value.reshape(()) if name == "logit_scale" else value for name, value in state.items()}


def loss(model: Any, batch: Mapping[str, Tensor], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
    """Symmetric InfoNCE. Records the share of pictures whose own caption is nearest."""
    image_BD, text_BD, scale, *_ = model(batch["image"], batch["tokens"])
    scale = clamp_keeping_way_back(scale.float())
    image_GD, text_GD = gather_rows(image_BD.float()), gather_rows(text_BD.float())
    tokens_GT = gather_rows(batch["tokens"])
    logits_GG = scale * image_GD @ text_GD.T
    own = torch.arange(len(logits_GG), device=logits_GG.device)
    same_GG = (tokens_GT[:, None] == tokens_GT[None]).all(dim=2)
    logits_GG = logits_GG.masked_fill(same_GG & (own[:, None] != own[None]), -torch.inf)
    value = (F.cross_entropy(logits_GG, own) + F.cross_entropy(logits_GG.T, own)) / 2
    accuracy = (logits_GG.detach().argmax(dim=1) == own).float().mean()
    return value, {"accuracy": accuracy, "logit_scale": scale.detach()}


def clamp_keeping_way_back(scale: Tensor) -> Tensor:
    """At most 100, as in CLIP; above it only gradients that would lower the scale pass."""
    clamped = scale + (scale.clamp(max=MAX_LOGIT_SCALE) - scale).detach()
    if clamped.requires_grad:
        above = scale.detach() > MAX_LOGIT_SCALE
        hooked: Any = clamped  # its register_hook has no types
        hooked.register_hook(lambda gradient: torch.where(above & (gradient < 0), 0.0, gradient))
    return clamped
