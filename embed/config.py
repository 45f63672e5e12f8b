"""Settings of the frozen networks and of everything that is computed from their vectors."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cluster.canonical import sha256_file
from cluster.settings import Section
from embed.architecture import image_size, resolve_architecture

Precision = Literal["fp32", "bf16", "fp16"]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


class PreprocessingConfig(Section):
    """From stored RGB pixels to the image tower's input. Part of an encoder's identity."""

    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "squash"] = "shortest"


class EncoderConfig(Section):
    """Which CLIP: an open_clip architecture (name, .json path or inline model config) and where weights come from."""

    architecture: str | dict[str, Any] = "ViT-L-14"
    weights: str | None = Field(
        default=None,
        description="a local .safetensors or checkpoint, or an open_clip pretrained tag; none: this run trains it",
    )
    vocabulary: Literal["full", "captions"] = Field(
        default="full",
        description="captions: only the BPE tokens that the training captions use (a CLIP trained by this run)",
    )
    preprocessing: PreprocessingConfig | None = Field(
        default=None, description="none: what the pretrained tag was trained with, else OpenAI's"
    )

    @field_validator("architecture")
    @classmethod
    def _architecture_exists(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        height, width = image_size(resolve_architecture(value))
        if height != width:
            raise ValueError(f"architecture takes {height}x{width} pixels; only square inputs are supported")
        # A file is read once: what it says is the setting, wherever it lies and whoever reads the stored config.
        return resolve_architecture(value) if isinstance(value, str) and value.endswith(".json") else value

    @model_validator(mode="after")
    def _compact_vocabulary_is_trained_here(self) -> "EncoderConfig":
        if self.vocabulary == "captions" and self.weights is not None:
            raise ValueError(
                "vocabulary 'captions' is for a CLIP that the run trains; weights from elsewhere need 'full'"
            )
        return self

    def model_cfg(self) -> dict[str, Any]:
        """open_clip's model config of the architecture."""
        return resolve_architecture(self.architecture)

    def content_settings(self) -> dict[str, Any]:
        """What the clip artifact depends on: a local weights file counts by its bytes, not by its path."""
        settings = self.model_dump(mode="json")
        if self.weights is not None and Path(self.weights).is_file():
            settings["weights"] = f"sha256:{sha256_file(self.weights)}"
        return settings


class EmbeddingsConfig(Section):
    """How the frozen CLIP is run. All but `decode_threads` shapes bits and is part of the encoder's identity."""

    precision: Precision = "fp32"
    batch_size: int = Field(default=64, ge=1, description="every forward has exactly this many rows")
    threads: int = Field(default=1, ge=1, description="intra-op threads of a forward on a CPU")
    decode_threads: int = Field(default=2, ge=1, description="threads that decode pictures ahead of the forward")

    def content_settings(self) -> dict[str, Any]:
        """What the vectors' bytes depend on."""
        return self.model_dump(mode="json", exclude={"decode_threads"})


class DedupConfig(Section):
    """Training rows whose CLIP image embedding is this close to an evaluation image count as its duplicates."""

    threshold: float = Field(default=0.95, ge=-1.0, le=1.0, description="cosine, for sets without their own")
    thresholds: dict[str, float] = Field(default={}, description="cosine by evaluation set, set by hand")
    matches_per_query: int = Field(default=100, ge=1, description="kept for one training row and set, best first")
    batch_rows: int = Field(default=4_096, ge=1, description="training rows searched at once")

    def content_settings(self) -> dict[str, Any]:
        """All of it: even `batch_rows` moves the last bit of a score."""
        return self.model_dump(mode="json")

    def threshold_of(self, evaluation_set: str) -> float:
        return self.thresholds.get(evaluation_set, self.threshold)


class ViewConfig(Section):
    """Which rows training may see."""

    validation_fraction: float = Field(default=0.02, ge=0.0, lt=1.0)
    exclude_overlap: bool = Field(default=True, description="leave out rows that match an evaluation image")


class PcaConfig(Section):
    """PCA of the image embeddings (unCLIP §2.2: 319 of 1,024 components, 1,024 buckets)."""

    share: Share = Field(default=0.99, description="of the variance that the kept components explain")
    components: int | None = Field(default=None, ge=1, description="a fixed number instead of the share")
    buckets: int = Field(default=1_024, ge=2)
    range_quantiles: tuple[float, float] = Field(
        default=(0.001, 0.999), description="of each component's projections: the ends of its code range"
    )
    sample_rows: int = Field(default=250_000, ge=1, description="about, at most, for the quantiles; drawn by pair_id")
    group_shards: int = Field(default=1_000, ge=1, description="shards whose moments are summed into one group")

    @field_validator("range_quantiles")
    @classmethod
    def _quantiles_are_ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0.0 <= value[0] < value[1] <= 1.0:
            raise ValueError(
                f"range_quantiles is {value}; two rising shares in [0, 1] are needed, such as [0.001, 0.999]"
            )
        return value
