"""What the models make of the facts that they are built with."""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.settings import Section
from train.family import Facts, family_of


def embedding_mean(facts: Facts) -> Tensor:
    """The image embeddings' mean (D,); zero where only the shape of a model is asked for."""
    return torch.tensor(facts.embedding_mean) if facts.embedding_mean else torch.zeros(facts.dimension)


def parameter_count(family: str, model_config: Section, facts: Facts) -> int:
    """Parameters of a family's model, counted on the meta device: no memory is taken."""
    with torch.device("meta"):
        model = family_of(family).build(model_config, facts)
    return sum(parameter.numel() for parameter in model.parameters())
