"""open_clip architectures as plain data, known without importing open_clip (3 s, 300 MB).

An architecture is open_clip's `model_cfg`: `{"embed_dim", "vision_cfg": {…}, "text_cfg": {…}}`. A recipe names a
built-in one ("ViT-L-14"), points at a JSON file, or spells it out. What cannot work here is refused by name before
anything is built: towers of Hugging Face text models and CoCa need tokenizers and heads that we do not carry.
"""

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

REQUIRED = ("embed_dim", "vision_cfg", "text_cfg")
DEFAULT_IMAGE_SIZE, DEFAULT_CONTEXT_LENGTH, BPE_VOCABULARY_SIZE = 224, 77, 49_408


@cache
def known_architectures() -> dict[str, Path]:
    """Names of open_clip's built-in architectures, with their files."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("open_clip is not installed; run `make setup`")
    folder = Path(spec.submodule_search_locations[0]) / "model_configs"
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def resolve_architecture(architecture: str | dict[str, Any]) -> dict[str, Any]:
    """The `model_cfg` that a recipe's `architecture` means. Raises `ValueError` that says what is allowed."""
    if isinstance(architecture, dict):
        model_cfg = architecture
    elif architecture.endswith(".json"):
        path = Path(architecture)
        if not path.is_file():
            raise ValueError(f"architecture file {architecture!r} does not exist")
        loaded = json.loads(path.read_text())
        model_cfg = loaded.get("model_cfg", loaded)  # Hugging Face folders wrap it beside "preprocess_cfg"
    else:
        if architecture not in known_architectures():
            raise ValueError(
                f"unknown architecture {architecture!r}. Use an open_clip name (such as ViT-B-32, ViT-L-14, RN50), "
                "the path of a .json model config, or an inline model config with embed_dim, vision_cfg, text_cfg"
            )
        model_cfg = json.loads(known_architectures()[architecture].read_text())
    return _checked(model_cfg)


def image_size(model_cfg: dict[str, Any]) -> tuple[int, int]:
    """Height and width of the image tower's input, in pixels."""
    size = model_cfg["vision_cfg"].get("image_size", DEFAULT_IMAGE_SIZE)
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def context_length(model_cfg: dict[str, Any]) -> int:
    return int(model_cfg["text_cfg"].get("context_length", DEFAULT_CONTEXT_LENGTH))


def vocabulary_size(model_cfg: dict[str, Any]) -> int:
    return int(model_cfg["text_cfg"].get("vocab_size", BPE_VOCABULARY_SIZE))


def dimension(model_cfg: dict[str, Any]) -> int:
    return int(model_cfg["embed_dim"])


def text_width(model_cfg: dict[str, Any]) -> int:
    """Width of the text tower's hidden states (what the prior and the decoder read)."""
    return int(model_cfg["text_cfg"].get("width", 512))


def with_vocabulary_size(model_cfg: dict[str, Any], size: int) -> dict[str, Any]:
    """The same architecture with another number of token embeddings (a compact vocabulary)."""
    return {**model_cfg, "text_cfg": {**model_cfg["text_cfg"], "vocab_size": size}}


def _checked(model_cfg: dict[str, Any]) -> dict[str, Any]:
    missing = [name for name in REQUIRED if name not in model_cfg]
    if missing:
        raise ValueError(
            f"architecture lacks {', '.join(missing)}; an open_clip model config has {', '.join(REQUIRED)}"
        )
    if "multimodal_cfg" in model_cfg:
        raise ValueError("architecture has a multimodal_cfg (CoCa); use a CLIP with an image and a text tower only")
    text_cfg = model_cfg["text_cfg"]
    for name in ("hf_model_name", "hf_tokenizer_name"):
        if text_cfg.get(name):
            raise ValueError(
                f"architecture has text_cfg.{name}={text_cfg[name]!r}, which needs a Hugging Face tokenizer; "
                "use an architecture with open_clip's own BPE"
            )
    if text_cfg.get("embed_cls"):
        raise ValueError("architecture has text_cfg.embed_cls, which adds a hidden state that is no caption token")
    return model_cfg
