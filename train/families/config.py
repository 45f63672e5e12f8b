"""Settings of the trained models and of sampling. Defaults of a model section are the paper's (unCLIP, Table 3)."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cluster.settings import Section
from train.config import TrainingConfig

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
NoiseScheduleName = Literal["cosine", "linear"]
Prediction = Literal["x_start", "eps", "v"]
TextSource = Literal["clip_hidden", "tokens"]


class DiffusionConfig(Section):
    """The forward process, and what the network answers."""

    timesteps: Count = 1_000
    noise_schedule: NoiseScheduleName = "cosine"
    prediction: Prediction = "eps"
    max_snr_weight: Annotated[float, Field(ge=1.0)] = Field(
        default=1.0, description="cap of the signal-to-noise ratio that a row's loss is weighed by; x_start only"
    )
    learned_variance: bool = Field(default=False, description="iDDPM's L_hybrid: twice the output channels")

    @model_validator(mode="after")
    def _weights_belong_to_x_start(self) -> "DiffusionConfig":
        if self.max_snr_weight > 1 and (self.prediction != "x_start" or self.learned_variance):
            raise ValueError("max_snr_weight above 1 is for prediction x_start without a learned variance")
        return self


class TextConfig(Section):
    """Where caption tokens come from: the frozen CLIP's hidden states, or a Transformer of the model's own (GLIDE)."""

    source: TextSource = "clip_hidden"
    width: Count = 2_048
    depth: int = Field(default=24, ge=0, description="of its own Transformer; a prior's text needs none")
    heads: Count = 32


class PriorModelConfig(Section):
    """A causal Transformer over [caption, z_t, timestep, noised z_i, query] (unCLIP §2.2)."""

    kind: Literal["diffusion"] = "diffusion"
    width: Count = 2_048
    depth: Count = 24
    heads: Count = 32
    dropout: Share = 0.0
    text: TextSource = "tokens"
    text_drop: Share = Field(default=0.1, description="steps that learn without caption and z_t, for guidance")
    diffusion: DiffusionConfig = DiffusionConfig(prediction="x_start")

    @model_validator(mode="after")
    def _predicts_the_embedding(self) -> "PriorModelConfig":
        if self.diffusion.prediction != "x_start" or self.diffusion.learned_variance:
            raise ValueError(
                "diffusion.prediction and learned_variance: the prior predicts the un-noised z_i; use x_start and false"
            )
        return self


class UNetConfig(Section):
    """The ADM U-Net's size."""

    channels: Count
    channel_multipliers: tuple[Count, ...] = (1, 2, 3, 4)
    res_blocks: Count = 3
    attention_at: tuple[Count, ...] = Field(default=(), description="resolutions, in the net's own pixels")
    head_channels: Count = 64
    dropout: Share = 0.0
    positions: bool = Field(default=False, description="a learned embedding of every pixel's place, for small nets")
    patch: Count = Field(default=1, description="pixels unshuffled into channels before the net: a CPU's speed-up")


class DecoderModelConfig(Section):
    """GLIDE's U-Net with z_i in the timestep embedding and in extra context tokens (unCLIP §2.1)."""

    image_size: Count = 64
    unet: UNetConfig = UNetConfig(channels=512, attention_at=(32, 16, 8), dropout=0.1)
    text: TextConfig = TextConfig(source="tokens")
    image_tokens: Count = Field(default=4, description="context tokens that z_i is projected to")
    image_drop: Share = Field(default=0.1, description="steps without z_i")
    text_drop: Share = Field(default=0.5, description="steps without the caption, independently")
    diffusion: DiffusionConfig = DiffusionConfig(learned_variance=True)


class UpsamplerModelConfig(Section):
    """An unconditional ADM net without attention, trained on crops, applied at full size (unCLIP §2.1)."""

    low_size: Count
    high_size: Count
    unet: UNetConfig
    crop_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    corruption: Literal["none", "blur"] = Field(default="blur", description="of the low picture, in training only")
    corruption_share: Share = Field(default=1.0, description="of the training pictures that are corrupted")
    blur_kernel: Literal[1, 3, 5, 7] = 3
    blur_sigma: Annotated[float, Field(gt=0.0)] = 0.6
    diffusion: DiffusionConfig = DiffusionConfig()

    @model_validator(mode="after")
    def _sizes_fit(self) -> "UpsamplerModelConfig":
        if self.high_size % self.low_size or self.high_size <= self.low_size:
            raise ValueError(f"high_size {self.high_size} must be a multiple of low_size {self.low_size}, and larger")
        multiple = max(self.high_size // self.low_size, self.unet.patch * 2 ** (len(self.unet.channel_multipliers) - 1))
        if self.crop_size % multiple:
            raise ValueError(
                f"a crop of {self.crop_size} pixels ({self.crop_fraction} of {self.high_size}) must be a multiple of "
                f"{multiple}: change crop_fraction, patch or the number of channel_multipliers"
            )
        if self.unet.positions or self.unet.attention_at:
            raise ValueError("unet.positions, unet.attention_at: an upsampler samples at another size than it trains")
        if self.diffusion.learned_variance:
            raise ValueError("diffusion.learned_variance: upsamplers sample with DDIM, which has no variance to learn")
        return self

    @property
    def crop_size(self) -> int:
        return round(self.high_size * self.crop_fraction)


class PriorConfig(Section):
    model: PriorModelConfig = PriorModelConfig()
    training: TrainingConfig


class DecoderConfig(Section):
    model: DecoderModelConfig = DecoderModelConfig()
    training: TrainingConfig


class UpsamplerConfig(Section):
    model: UpsamplerModelConfig
    training: TrainingConfig


class SamplerConfig(Section):
    """How one model of the stack is sampled."""

    steps: Count
    method: Literal["ddpm", "ddim"] = "ddim"
    eta: Share = Field(default=0.0, description="of DDIM")
    guidance_scale: Annotated[float, Field(ge=0.0)] = 1.0


class SamplesConfig(Section):
    """Which pictures the run draws and scores, and how each model is sampled."""

    sets: tuple[str, ...] | None = Field(
        default=None, description="evaluation sets, or validation; none: every evaluation set, else validation"
    )
    captions: Count = Field(default=64, description="held-out captions of each set that are drawn and scored")
    shown: Count = Field(default=12, description="captions of each set in the grid")
    modes: tuple[Literal["prior", "text_embedding", "caption"], ...] = ("prior", "text_embedding", "caption")
    batch_size: Count = 32
    candidates: Count = Field(default=2, description="draws of z_i; the one nearest to z_t is kept")
    prior: SamplerConfig = SamplerConfig(steps=64, method="ddpm")
    decoder: SamplerConfig = SamplerConfig(steps=250, method="ddpm", guidance_scale=1.25)
    upsampler_256: SamplerConfig = SamplerConfig(steps=27)
    upsampler_1024: SamplerConfig = SamplerConfig(steps=15)
