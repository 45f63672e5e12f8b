"""What a CLIP is, as data: `encoder.json` of the `clip` artifact, and the identity of the vectors that it makes.

Two caches may be compared, merged or reused only where their encoder identities are equal. The identity is computed
from what was really loaded: weights are hashed tensor by tensor in the order of their names, so that the file format
they came in does not matter.
"""

import json
from typing import Any

from cluster.artifact import Artifact
from cluster.canonical import canonical_json, digest
from cluster.errors import UserError
from cluster.settings import Section
from embed import architecture
from embed.config import EmbeddingsConfig, PreprocessingConfig
from embed.tokenizer import Tokenizer

WEIGHTS_FILE, ENCODER_FILE = "model.safetensors", "encoder.json"


class EncoderDescription(Section):
    """`encoder.json`: everything but the weights that is needed to run this CLIP, and the weights' hash."""

    format: int = 1
    architecture: dict[str, Any]
    vocabulary: list[int] | None
    preprocessing: PreprocessingConfig
    weights_sha256: str
    weights_precision: str
    made: dict[str, Any]

    @property
    def dimension(self) -> int:
        return architecture.dimension(self.architecture)

    @property
    def image_size(self) -> int:
        return architecture.image_size(self.architecture)[0]

    @property
    def context_length(self) -> int:
        return architecture.context_length(self.architecture)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.context_length, self.vocabulary)

    def to_json(self) -> bytes:
        return canonical_json(self.model_dump(mode="json")) + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> "EncoderDescription":
        fields = json.loads(data)
        if fields.get("format") != 1:
            raise UserError(f"encoder.json has format {fields.get('format')!r}; this version of unclip reads format 1")
        return cls.model_validate(fields)


def read_description(clip_uri: str) -> EncoderDescription:
    """The description in a `clip` artifact. Loads neither torch nor weights."""
    return EncoderDescription.from_json(Artifact.open(clip_uri).file(ENCODER_FILE).read_bytes())


def encoder_identity(description: EncoderDescription, config: EmbeddingsConfig) -> dict[str, Any]:
    """Everything that shapes the bits of an embedding on given hardware and libraries; `digest` of it names a cache."""
    return {
        "architecture": description.architecture,
        "weights": description.weights_sha256,
        "preprocessing": {**description.preprocessing.model_dump(mode="json"), "size": description.image_size},
        "tokenizer": description.tokenizer().identity(),
        "precision": config.precision,
        "batch_size": config.batch_size,
        "threads": config.threads,
    }


def encoder_digest(description: EncoderDescription, config: EmbeddingsConfig) -> str:
    return digest(encoder_identity(description, config))
