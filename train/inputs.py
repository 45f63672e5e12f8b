"""From the artifacts that a training run is fed to its rows and to the facts that its model is built with.

CLIP reads `images`; the other families read `view`, `embeddings`, `images`, `clip` and `pca`.
"""

import json
from dataclasses import dataclass
from typing import Any

from cluster.artifact import Artifact
from cluster.errors import UserError
from embed.architecture import context_length, dimension, text_width, with_vocabulary_size
from embed.clip import load_encoder
from embed.config import EncoderConfig
from embed.description import read_description
from embed.tokenizer import Tokenizer, compact_vocabulary
from train.config import TrainingConfig
from train.data import TrainRows, rows_of_images, rows_of_view
from train.family import Facts, Needs


@dataclass(frozen=True)
class Inputs:
    """What a run trains on: its rows, what its model takes from them, and the digests of what was read."""

    rows: TrainRows
    facts: Facts
    digests: dict[str, str]
    vocabulary: list[int] | None = None  # of a CLIP's compact tokenizer


def open_clip_inputs(
    uris: dict[str, str], encoder: EncoderConfig, training: TrainingConfig, needs: Needs, validation_fraction: float
) -> Inputs:
    """Rows outside the validation split. A compact vocabulary is made from exactly their captions."""
    images = _open(uris, "images")
    table = rows_of_images(images, validation_fraction)
    vocabulary = None
    if encoder.vocabulary == "captions":
        vocabulary = compact_vocabulary(set(table.captions(range(len(table)))))
    model_cfg = encoder.model_cfg()
    tokenizer = Tokenizer(context_length(model_cfg), vocabulary)
    rows = TrainRows(table, needs, tokenizer=tokenizer, cache_bytes=training.cache_bytes)
    facts = Facts(
        dimension=dimension(model_cfg),
        text_width=text_width(model_cfg),
        context_length=tokenizer.context_length,
        vocabulary_size=tokenizer.size,
    )
    return Inputs(rows, facts, {"images": images.content_digest}, vocabulary)


def open_model_inputs(uris: dict[str, str], training: TrainingConfig, needs: Needs, device: str) -> Inputs:
    """Rows of the view's training split, with what the frozen CLIP and the PCA say about them."""
    opened = {name: _open(uris, name) for name in ("view", "embeddings", "images", "clip", "pca")}
    table = rows_of_view(opened["view"], opened["embeddings"], opened["images"])
    description = read_description(opened["clip"].uri)
    encoder = load_encoder(opened["clip"].uri, device=device) if "text_hidden" in needs.columns else None
    rows = TrainRows(table, needs, tokenizer=description.tokenizer(), encoder=encoder, cache_bytes=training.cache_bytes)
    return Inputs(rows, read_facts(opened["clip"], opened["pca"]), {n: a.content_digest for n, a in opened.items()})


def read_facts(clip: Artifact, pca: Artifact) -> Facts:
    """The facts of every model behind CLIP."""
    description = read_description(clip.uri)
    statistics: dict[str, Any] = json.loads(pca.file("statistics.json").read_bytes())
    tokenizer = description.tokenizer()
    return Facts(
        dimension=description.dimension,
        text_width=text_width(description.architecture),
        context_length=tokenizer.context_length,
        vocabulary_size=tokenizer.size,
        embedding_scale=float(statistics["scale"]),
        embedding_mean=tuple(float(value) for value in statistics["mean"]),
    )


def model_cfg_of(encoder: EncoderConfig, facts: Facts) -> dict[str, Any]:
    """open_clip's model config of a CLIP trained here, its vocabulary included."""
    return with_vocabulary_size(encoder.model_cfg(), facts.vocabulary_size)


def _open(uris: dict[str, str], name: str) -> Artifact:
    if name not in uris:
        raise UserError(f"training needs the artifact {name!r}; the job names {', '.join(sorted(uris)) or 'none'}")
    return Artifact.open(uris[name])
