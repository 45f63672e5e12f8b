"""What the models make of the facts that they are built with."""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.settings import Section
from embed.architecture import context_length, dimension, text_width, vocabulary_size
from embed.config import EncoderConfig
from train.family import Facts, family_of


def embedding_mean(facts: Facts) -> Tensor:
    """The image embeddings' mean (D,); zero where only the shape of a model is asked for."""
    return torch.tensor(facts.embedding_mean) if facts.embedding_mean else torch.zeros(facts.dimension)


def shape_facts(encoder: EncoderConfig) -> Facts:
    """What a CLIP's architecture alone says: enough for the shapes of the models behind it."""
    model_cfg = encoder.model_cfg()
    return Facts(
        dimension=dimension(model_cfg),
        text_width=text_width(model_cfg),
        context_length=context_length(model_cfg),
        vocabulary_size=vocabulary_size(model_cfg),
    )


def parameter_count(family: str, model_config: Section, facts: Facts) -> int:
    """Parameters of a family's model, counted on the meta device: no memory is taken."""
    with torch.device("meta"):
        model = family_of(family).build(model_config, facts)
    return sum(parameter.numel() for parameter in model.parameters())
