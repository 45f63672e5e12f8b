"""A family: what the one training loop must know of a kind of model. A module of `train/families/` is one.

    CONFIG                              the model's config section
    needs(config) -> Needs              which columns its batches have, and how large its pictures are
    build(config, facts) -> nn.Module   a fresh model, its weights drawn from torch's global generator
    loss(model, batch, draws)           -> scalar loss, mean over the batch's rows, and named scalars to record

`model` in `loss` is called and read like the module, but the call goes through the DeepSpeed engine (`ThroughEngine`):
going past it would skip ZeRO's hooks. All
randomness of a loss comes from `draws` (train/draws.py); metrics are detached scalar tensors. Families are named in
one explicit dict and imported when asked for, so that a run of one never loads the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, Protocol, cast

from torch import Tensor, nn

from cluster.errors import UserError
from cluster.settings import Section
from embed.config import PreprocessingConfig
from train.draws import Draws

Column = Literal["image", "tokens", "image_embedding", "text_embedding", "text_hidden"]

FAMILIES = {
    "clip": "train.families.clip",
    "prior_diffusion": "train.families.prior_diffusion",
    "decoder": "train.families.decoder",
    "upsampler": "train.families.upsampler",
}


@dataclass(frozen=True)
class Needs:
    """Columns of a family's batches.

    `image` is (B, 3, S, S) float32 in [-1, 1] with S = `image_size`; with a `preprocessing` it is an encoder's own
    input instead. `tokens` (B, T) int64; `image_embedding`, `text_embedding` (B, D) float32, unit vectors;
    `text_hidden` (B, T, W) float32: the frozen CLIP text tower's last hidden states.
    A loss that needs the `whole_batch` compares its rows with each other, so that no gradient accumulation gives it.
    """

    columns: frozenset[Column]
    image_size: int | None = None
    preprocessing: PreprocessingConfig | None = None
    whole_batch: bool = False


@dataclass(frozen=True)
class Facts:
    """What a model's shape and scales take from the artifacts it is fed; recorded in its `config.json`."""

    dimension: int = 0  # of the CLIP embeddings
    text_width: int = 0  # of `text_hidden`
    context_length: int = 0
    vocabulary_size: int = 0
    embedding_scale: float = 1.0  # embedding * scale has unit variance, averaged over dimensions (17.2 in the paper)
    embedding_mean: tuple[float, ...] = field(default=())


class Family(Protocol):
    """The interface of a module of `train/families/`."""

    CONFIG: type[Section]

    def needs(self, config: Any) -> Needs: ...

    def build(self, config: Any, facts: Facts) -> nn.Module: ...

    def loss(self, model: Any, batch: Mapping[str, Tensor], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]: ...


def family_of(name: str) -> Family:
    """The family of that name. Raises `UserError` for one that does not exist."""
    if name not in FAMILIES:
        raise UserError(f"unknown model family {name!r}; there are {', '.join(FAMILIES)}")
    return cast(Family, import_module(FAMILIES[name]))
