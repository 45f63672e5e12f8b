"""The full stack: caption → prior → decoder → upsamplers, opened from a run's artifacts.

    mode             z_i that the decoder is given
    prior            the diffusion prior's, the better of two draws           P(x|y) = P(x|z_i, y) P(z_i|y)
    text_embedding   z_t in its place (the paper's zero-shot use of CLIP's joint space)
    caption          none: the caption alone, as in the steps that trained without z_i

Shapes: B captions, T tokens, W hidden width, D embedding dimension.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from cluster.artifact import Artifact
from cluster.errors import UserError
from embed.clip import ClipEncoder, load_encoder
from train.families.config import SamplesConfig
from train.families.decoder import PIXELS, Decoder, sample_decoder
from train.families.prior_diffusion import DiffusionPrior, sample_prior
from train.families.upsampler import Upsampler, sample_upsampler
from train.family import Facts, family_of
from train.sample.noise import SeededNoise

Mode = Literal["prior", "text_embedding", "caption"]
MODELS = ("clip", "prior", "decoder", "upsampler_256", "upsampler_1024")
UPSAMPLERS = ("upsampler_256", "upsampler_1024")


@dataclass(frozen=True)
class Drawn:
    """What the stack made of some captions."""

    pictures: dict[str, NDArray[np.uint8]]  # by model, (B, H, W, 3), in the order of the cascade
    z_i: NDArray[np.float32] | None  # (B, D) what the decoder was given

    @property
    def final(self) -> NDArray[np.uint8]:
        return list(self.pictures.values())[-1]


class Stack:
    def __init__(
        self,
        *,
        encoder: ClipEncoder,
        prior: DiffusionPrior,
        decoder: Decoder,
        upsamplers: dict[str, Upsampler],
        config: SamplesConfig,
        device: torch.device,
    ) -> None:
        sizes = [decoder.config.image_size]
        for name, upsampler in upsamplers.items():
            if upsampler.config.low_size != sizes[-1]:
                raise UserError(
                    f"{name}.model.low_size is {upsampler.config.low_size}, but the model before it draws "
                    f"{sizes[-1]} pixels; set {name}.model.low_size={sizes[-1]}"
                )
            sizes.append(upsampler.config.high_size)
        self.encoder, self.prior, self.decoder, self.upsamplers = encoder, prior, decoder, upsamplers
        self.config, self.device, self.sizes = config, device, sizes

    @classmethod
    def open(cls, uris: Mapping[str, str], config: SamplesConfig, *, device: str = "cpu") -> Stack:
        """The stack of a run; `uris` names its artifacts (clip, prior, decoder, upsampler_256, upsampler_1024)."""
        if missing := [name for name in MODELS if name not in uris]:
            raise UserError(f"sampling needs the artifacts {', '.join(MODELS)}; {', '.join(missing)} are not named")
        models = {name: open_model(uris[name]).to(device) for name in MODELS[1:]}
        return cls(
            encoder=load_encoder(uris["clip"], device=device),
            prior=cast(DiffusionPrior, models["prior"]),
            decoder=cast(Decoder, models["decoder"]),
            upsamplers={name: cast(Upsampler, models[name]) for name in UPSAMPLERS},
            config=config,
            device=torch.device(device),
        )

    @torch.no_grad()
    def draw(self, captions: Sequence[str], seeds: Sequence[int], mode: Mode = "prior") -> Drawn:
        """A picture of each caption. A picture depends on its caption, seed and mode, not on what shares the batch."""
        tokens_BT, _ = self.encoder.tokenize(captions)
        tokens_BT = tokens_BT.to(self.device)
        hidden_BTW = self.encoder.text_hidden(tokens_BT)
        z_t_BD = F.normalize(self.encoder.encode_text(tokens_BT), dim=1)
        z_i_BD = self._image_embedding(mode, tokens_BT, hidden_BTW, z_t_BD, seeds)
        size = self.sizes[0]
        picture = sample_decoder(
            self.decoder,
            self.config.decoder,
            tokens_BT=tokens_BT,
            hidden_BTW=hidden_BTW,
            image_embedding_BD=z_i_BD,
            noise=SeededNoise(seeds, "decoder", (PIXELS, size, size), self.device),
        )
        pictures = {"decoder": to_uint8(picture)}
        for name, upsampler in self.upsamplers.items():
            size = upsampler.config.high_size
            picture = sample_upsampler(
                upsampler,
                getattr(self.config, name),
                low_BChw=picture.clamp(-1, 1),
                noise=SeededNoise(seeds, name, (PIXELS, size, size), self.device),
            )
            pictures[name] = to_uint8(picture)
        return Drawn(pictures, None if z_i_BD is None else z_i_BD.cpu().numpy())

    def _image_embedding(
        self, mode: Mode, tokens_BT: Tensor, hidden_BTW: Tensor, z_t_BD: Tensor, seeds: Sequence[int]
    ) -> Tensor | None:
        if mode == "caption":
            return None
        if mode == "text_embedding":
            return z_t_BD
        shape = (z_t_BD.shape[1],)
        candidates = self.config.candidates
        return sample_prior(
            self.prior,
            self.config.prior,
            tokens_BT=tokens_BT,
            hidden_BTW=hidden_BTW,
            text_embedding_BD=z_t_BD,
            noises=[SeededNoise(seeds, f"prior/{index}", shape, self.device) for index in range(candidates)],
        )


def open_model(uri: str) -> nn.Module:
    """A trained model as its artifact describes it, in evaluation mode."""
    artifact = Artifact.open(uri)
    described: dict[str, Any] = json.loads(artifact.file("config.json").read_bytes())
    family = family_of(described["family"])
    facts = Facts(**{**described["facts"], "embedding_mean": tuple(described["facts"]["embedding_mean"])})
    model = family.build(family.CONFIG.model_validate(described["model"]), facts)
    model.load_state_dict(load_file(artifact.file("model.safetensors")))
    return model.eval().requires_grad_(False)


def to_uint8(picture_BCHW: Tensor) -> NDArray[np.uint8]:
    """[−1, 1] to 0 … 255, (B, H, W, 3)."""
    scaled = ((picture_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels: NDArray[np.uint8] = scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return pixels
