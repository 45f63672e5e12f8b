"""The `clip` stage where the weights come from elsewhere: a load, not a training.

From a local `.safetensors`, a local checkpoint (read with `weights_only`, so no pickle runs), or an open_clip
pretrained tag. Names and shapes must fit the architecture exactly; open_clip's own loader would resize position
embeddings in silence and so hide a checkpoint of another architecture.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cluster.errors import UserError
from cluster.workshop import Workshop
from embed.clip import build_clip, save_encoder
from embed.config import EncoderConfig, PreprocessingConfig
from embed.description import ENCODER_FILE, WEIGHTS_FILE


def member(payload: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Gang member. Payload: `encoder` (an EncoderConfig with weights), `out` (the clip workshop)."""
    config = EncoderConfig.model_validate(payload["encoder"])
    if config.weights is None:
        raise UserError("clip.encoder.weights is not set, so there is nothing to load")
    path, tag = find_weights(config)
    report({"done": 0, "total": 1, "unit": "model"})
    model = build_clip(config.model_cfg())
    load_weights(model, read_weights(path), source=str(path))
    with Workshop.from_plain(payload["out"]).attempt(0) as attempt:
        description = save_encoder(
            model.state_dict(),
            weights_path=attempt.path(WEIGHTS_FILE),
            encoder_path=attempt.path(ENCODER_FILE),
            model_cfg=config.model_cfg(),
            vocabulary=None,
            preprocessing=config.preprocessing or _preprocessing_of(tag),
            made={"by": "load", "pretrained": config.weights if tag else None},
        )
        attempt.commit(rows=1, counts={"ok": 1}, stats={"loaded_from": str(path)})
    report({"done": 1, "total": 1, "unit": "model"})
    return {"rows": 1, "weights_sha256": description.weights_sha256}


def find_weights(config: EncoderConfig) -> tuple[Path, dict[str, Any] | None]:
    """The local file of `config.weights` and, where that is a pretrained tag (fetched now), open_clip's entry of it."""
    assert config.weights is not None
    path = Path(config.weights)
    if path.is_file():
        return path, None
    if not isinstance(config.architecture, str):
        raise UserError(f"weights file {config.weights!r} does not exist; tags need an architecture by name")
    tag = get_pretrained_cfg(config.architecture, config.weights)
    if not tag:
        tags = ", ".join(list_pretrained_tags_by_model(config.architecture)) or "none"
        raise UserError(
            f"weights {config.weights!r} is neither a file nor a pretrained tag of {config.architecture} (tags: {tags})"
        )
    if bool(tag.get("quick_gelu")) != bool(config.model_cfg().get("quick_gelu")):
        raise UserError(
            f"tag {config.weights!r} was trained {'with' if tag.get('quick_gelu') else 'without'} QuickGELU and "
            f"{config.architecture} is not; choose the architecture whose name "
            f"{'ends' if tag.get('quick_gelu') else 'does not end'} in -quickgelu"
        )
    try:
        return Path(download_pretrained(tag)), tag
    except Exception as error:  # hub clients raise whatever their transport does
        raise UserError(
            f"cannot download {config.architecture} / {config.weights}: {error}. "
            "Without a network, set clip.encoder.weights to a local file."
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from safetensors or a checkpoint, without unpickling anything but tensors."""
    try:
        loaded = load_file(path) if path.suffix == ".safetensors" else _read_checkpoint(path)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path} cannot be read as weights: {first_line}. A safetensors file, or a checkpoint of plain tensors "
            "(torch.load with weights_only=True), is needed; a TorchScript archive must be converted first."
        ) from error
    state = loaded.get("state_dict", loaded)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict of tensors; save one with safetensors.torch.save_file")
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_weights(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Put `state` into `model`. Raises `UserError` naming the tensors that do not fit."""
    state = convert_state_dict(model, dict(state))
    if hasattr(model, "text"):
        state = convert_to_custom_text_state_dict(state)
    expected = model.state_dict()
    if "logit_scale" in state and state["logit_scale"].numel() == 1:
        state = {**state, "logit_scale": state["logit_scale"].reshape(expected["logit_scale"].shape)}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - state.keys())]
    problems += [f"{name} is not part of it" for name in sorted(state.keys() - expected.keys())]
    problems += [
        f"{name} is {tuple(state[name].shape)} where {tuple(expected[name].shape)} is needed"
        for name in sorted(expected.keys() & state.keys())
        if state[name].shape != expected[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{source} does not fit the architecture: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(dict(state))


def _read_checkpoint(path: Path) -> dict[str, Any]:
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return loaded if isinstance(loaded, dict) else {}


def _preprocessing_of(tag: dict[str, Any] | None) -> PreprocessingConfig:
    fields = {name: (tag or {}).get(name) for name in PreprocessingConfig.model_fields}
    return PreprocessingConfig.model_validate({name: value for name, value in fields.items() if value is not None})
