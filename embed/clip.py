"""CLIP, frozen: an open_clip model, its preprocessing and its tokenizer as one thing with an identity.

    stored RGB pixels ─ resize, crop ─► pixels_BHWC uint8 ─ ClipEncoder.encode_image ─► z_i (B, D) float32
    caption           ─ tokenize ─────► tokens_BT int64   ─ ClipEncoder.encode_text ──► z_t (B, D) float32
                                                          ─ ClipEncoder.text_hidden ──► (B, T, W) float32

Embeddings come unnormalised: the cache stores the norm beside the unit vector. `text_hidden` is what the prior and
the decoder read: the last layer's states after the final layer norm, before pooling. Methods run without gradient
but not under inference mode, because their results are inputs of models that train.

Shapes: B batch, H height, W width (of text states: model width), C channels, T tokens, D embedding dimension.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.model import CLIP, CustomTextCLIP, convert_weights_to_lp, get_cast_dtype
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cluster.artifact import Artifact
from cluster.errors import UserError
from embed.architecture import text_width, with_vocabulary_size
from embed.config import EncoderConfig, PreprocessingConfig
from embed.description import ENCODER_FILE, WEIGHTS_FILE, EncoderDescription
from embed.tokenizer import BYTE_TOKENS, SPECIAL_WORDS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class ClipEncoder:
    """A CLIP with fixed weights, run at a precision on a device. Weights on disk are fp32 whatever the precision."""

    def __init__(
        self, model: nn.Module, description: EncoderDescription, *, precision: str = "fp32", device: str = "cpu"
    ) -> None:
        self.description = description
        self.tokenizer = description.tokenizer()
        self.dimension = description.dimension
        self.text_width = text_width(description.architecture)
        self.context_length = description.context_length
        self.image_size = description.image_size
        self.device = torch.device(device)
        self._dtype = DTYPES[precision]
        self._model: Any = model.eval().requires_grad_(False).to(self.device)
        if precision != "fp32":
            convert_weights_to_lp(self._model, dtype=self._dtype)

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, NDArray[np.bool_]]:
        """Tokens (B, T) int64 and, per caption, whether it was cut to the context."""
        tokens_BT, cut_B = self.tokenizer(captions)
        return torch.from_numpy(tokens_BT), cut_B

    def preprocess(self, image: Image.Image) -> NDArray[np.uint8]:
        """A decoded picture to the image tower's pixels, (H, W, 3) uint8."""
        return resize_and_crop(image, self.image_size, self.description.preprocessing)

    @torch.no_grad()
    def encode_image(self, pixels_BHWC: Tensor) -> Tensor:
        """Image embeddings (B, D), float32, unnormalised."""
        images_BCHW = normalize_pixels(pixels_BHWC.to(self.device, non_blocking=True), self.description.preprocessing)
        embedding: Tensor = self._model.encode_image(images_BCHW.to(self._dtype))
        return embedding.float()

    @torch.no_grad()
    def encode_text(self, tokens_BT: Tensor) -> Tensor:
        """Text embeddings (B, D), float32, unnormalised."""
        embedding: Tensor = self._model.encode_text(tokens_BT.to(self.device, non_blocking=True))
        return embedding.float()

    @torch.no_grad()
    def text_hidden(self, tokens_BT: Tensor) -> Tensor:
        """The text tower's last hidden states (B, T, W), float32. Positions after <end_of_text> are padding."""
        tokens_BT = tokens_BT.to(self.device)
        tower = getattr(self._model, "text", self._model)  # CustomTextCLIP keeps its text tower apart, CLIP is it
        cast_dtype = tower.transformer.get_cast_dtype()
        hidden_BTW = tower.token_embedding(tokens_BT).to(cast_dtype) + tower.positional_embedding.to(cast_dtype)
        hidden_BTW = tower.transformer(hidden_BTW, attn_mask=tower.attn_mask)
        return torch.as_tensor(tower.ln_final(hidden_BTW)).float()


def best_device(threads: int) -> str:
    """Where frozen networks run here. On a CPU this process's forwards get `threads` threads: bits follow it."""
    if torch.cuda.is_available():
        return "cuda"
    torch.set_num_threads(threads)
    return "cpu"


def build_clip(model_cfg: dict[str, Any], *, precision: str = "fp32") -> nn.Module:
    """An open_clip model with fresh weights from torch's global generator; nothing is downloaded."""
    arguments = {name: value for name, value in model_cfg.items() if name != "custom_text"}
    arguments["vision_cfg"] = {**model_cfg["vision_cfg"], "timm_model_pretrained": False}
    kind = CustomTextCLIP if model_cfg.get("custom_text") else CLIP
    try:
        model: nn.Module = kind(**arguments, cast_dtype=get_cast_dtype(precision))
    except (TypeError, RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"open_clip cannot build this architecture: {error}. Compare it with a built-in one."
        ) from error
    return model


def clip_parameter_count(config: EncoderConfig) -> int:
    """Parameters, counted on the meta device. A vocabulary of captions counts without the merges that they will add."""
    model_cfg = config.model_cfg()
    if config.vocabulary == "captions":
        model_cfg = with_vocabulary_size(model_cfg, BYTE_TOKENS + len(SPECIAL_WORDS))
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_clip(model_cfg).parameters())


def resize_and_crop(image: Image.Image, size: int, preprocessing: PreprocessingConfig) -> NDArray[np.uint8]:
    """Resize and centre-crop to (size, size, 3), rounding as torchvision does for open_clip's own transform."""
    image = image if image.mode == "RGB" else image.convert("RGB")
    resampling = RESAMPLING[preprocessing.interpolation]
    if preprocessing.resize_mode == "squash":
        return np.asarray(image if image.size == (size, size) else image.resize((size, size), resampling))
    width, height = image.size
    short = min(width, height)
    if short != size:
        image = image.resize((int(size * width / short), int(size * height / short)), resampling)
    left, top = round((image.width - size) / 2.0), round((image.height - size) / 2.0)
    if image.size != (size, size):
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)


def normalize_pixels(pixels_BHWC: Tensor, preprocessing: PreprocessingConfig) -> Tensor:
    """uint8 pixels (B, H, W, C) to the image tower's float32 input (B, C, H, W)."""
    mean_C = torch.tensor(preprocessing.mean, device=pixels_BHWC.device)
    std_C = torch.tensor(preprocessing.std, device=pixels_BHWC.device)
    return ((pixels_BHWC.float() / 255.0 - mean_C) / std_C).permute(0, 3, 1, 2).contiguous()


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """One hash of a state dict: names, dtypes, shapes and little-endian bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        total.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{tuple(tensor.shape)}\0".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def save_encoder(
    state: Mapping[str, Tensor],
    *,
    weights_path: str | Path,
    encoder_path: str | Path,
    model_cfg: dict[str, Any],
    vocabulary: list[int] | None,
    preprocessing: PreprocessingConfig,
    made: dict[str, Any],
) -> EncoderDescription:
    """Write `model.safetensors` and `encoder.json` of a `clip` artifact. Floating weights are written as fp32.

    `made` says how the weights came to be, in data that does not vary between equal runs: it is content.
    """
    weights = {
        name: (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in sorted(state.items())
    }
    description = EncoderDescription(
        architecture=model_cfg,
        vocabulary=vocabulary,
        preprocessing=preprocessing,
        weights_sha256=weights_sha256(weights),
        weights_precision="fp32",
        made=made,
    )
    save_file(weights, weights_path)
    Path(encoder_path).write_bytes(description.to_json())
    return description


def load_encoder(clip_uri: str, *, precision: str = "fp32", device: str = "cpu") -> ClipEncoder:
    """The encoder of a published `clip` artifact. Weights that do not hash to what encoder.json says are refused."""
    artifact = Artifact.open(clip_uri)
    description = EncoderDescription.from_json(artifact.file(ENCODER_FILE).read_bytes())
    state = load_file(artifact.file(WEIGHTS_FILE))
    found = weights_sha256(state)
    if found != description.weights_sha256:
        raise UserError(
            f"the weights in {clip_uri} hash to {found[:12]}…, but its encoder.json says "
            f"{description.weights_sha256[:12]}…; build the artifact again with --rebuild clip"
        )
    model = build_clip(description.architecture, precision=precision)
    model.load_state_dict(state)
    return ClipEncoder(model, description, precision=precision, device=device)
