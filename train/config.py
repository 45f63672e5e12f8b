"""Settings of everything that is trained: the loop, DeepSpeed, and CLIP where the run trains its own.

The models' own sections live beside the models (`train/families/config.py`); a trained stage's section is a model
section and a `training` section.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from cluster.settings import Section
from embed.config import EncoderConfig


class DeepSpeedConfig(Section):
    """What DeepSpeed is asked for. The result is the same for every stage, up to the order of float sums."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1, description="what the processes share out: 1 optimizer states, 2 also gradients, 3 also weights"
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="of forward and backward; master weights, moments and EMA are fp32 always"
    )


class TrainingConfig(Section):
    """One training run: how long, on which batches, with which AdamW."""

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1, description="rows a step, over all processes; the number of processes divides it")
    learning_rate: float = Field(gt=0.0)
    schedule: Literal["constant", "cosine"] = Field(default="constant", description="after the warm-up")
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0.0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0.0)
    ema_decay: float = Field(default=0.9999, ge=0.0, lt=1.0, description="reached by a warm-up: (1+t)/(10+t) before")
    gradient_clip: float = Field(default=1.0, gt=0.0, description="largest global norm of the gradient")
    gradient_accumulation: int = Field(default=1, ge=1, description="micro-batches a step")
    checkpoint_every: int = Field(default=500, ge=1, description="steps")
    block_rows: int = Field(default=256, ge=1, description="consecutive rows that one process reads as a block")
    cache_bytes: int = Field(default=512 << 20, ge=0, description="decoded pixels kept in memory, a process")
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    def content_settings(self) -> dict[str, Any]:
        """What the trained weights depend on. The rest may change between two starts of one training run: it alters
        them as the number of processes does, by the order of float sums, or not at all."""
        how = {"checkpoint_every", "cache_bytes", "gradient_accumulation"}
        return self.model_dump(mode="json", exclude={**dict.fromkeys(how, True), "deepspeed": {"zero_stage"}})

    @model_validator(mode="after")
    def _values_fit_each_other(self) -> "TrainingConfig":
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}; both must lie in [0, 1)")
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of gradient_accumulation {self.gradient_accumulation}"
            )
        return self


class ClipConfig(Section):
    """The frozen CLIP: a published one (`encoder.weights`), or one that this run trains (`training`)."""

    encoder: EncoderConfig = EncoderConfig()
    training: TrainingConfig | None = None

    @model_validator(mode="after")
    def _is_loaded_or_trained(self) -> "ClipConfig":
        if (self.training is None) == (self.encoder.weights is None):
            given = "neither is" if self.training is None else "both are"
            raise ValueError(
                f"a CLIP is loaded (clip.encoder.weights) or trained here (clip.training), and {given} given; set one"
            )
        if self.training is not None and self.training.gradient_accumulation > 1:
            raise ValueError(
                f"training.gradient_accumulation is {self.training.gradient_accumulation}; a contrastive loss compares "
                "the whole batch, so CLIP needs 1 (use a smaller batch_size or more processes)"
            )
        return self
