import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from embed.config import DedupConfig, EmbeddingsConfig, EncoderConfig, PcaConfig


def test_settings_load_neither_torch_nor_numpy() -> None:
    heavy = "[name for name in ('torch', 'numpy', 'pyarrow', 'open_clip', 'faiss') if name in sys.modules]"
    command = [sys.executable, "-c", f"import sys, embed.config; embed.config.EncoderConfig(); print({heavy})"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_an_architecture_file_is_the_architecture_it_holds(tmp_path: Path, tiny_clip: dict[str, Any]) -> None:
    (tmp_path / "plain.json").write_text(json.dumps(tiny_clip))
    (tmp_path / "wrapped.json").write_text(json.dumps({"model_cfg": tiny_clip, "preprocess_cfg": {}}))
    inline = EncoderConfig(architecture=tiny_clip)
    assert EncoderConfig(architecture=str(tmp_path / "plain.json")) == inline
    assert EncoderConfig(architecture=str(tmp_path / "wrapped.json")) == inline


def test_weights_count_by_their_bytes_and_not_by_their_path(tmp_path: Path, tiny_clip: dict[str, Any]) -> None:
    def settings(name: str, data: bytes) -> dict[str, Any]:
        (tmp_path / name).write_bytes(data)
        return EncoderConfig(architecture=tiny_clip, weights=str(tmp_path / name)).content_settings()

    assert settings("a.pt", b"one") == settings("b.pt", b"one") != settings("a.pt", b"two")


def test_patience_is_no_content() -> None:
    assert "decode_threads" not in EmbeddingsConfig().content_settings()
    assert EmbeddingsConfig.model_validate(EmbeddingsConfig(batch_size=7).content_settings()).batch_size == 7


def test_an_evaluation_set_may_have_its_own_threshold() -> None:
    config = DedupConfig(threshold=0.9, thresholds={"coco": 0.8})
    assert (config.threshold_of("coco"), config.threshold_of("cub")) == (0.8, 0.9)


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        (PcaConfig, {"range_quantiles": (0.9, 0.1)}, "two rising shares"),
        (PcaConfig, {"share": 1.5}, "less than 1"),
        (EmbeddingsConfig, {"precision": "int8"}, "fp32"),
        (EmbeddingsConfig, {"batchsize": 3}, "Extra inputs"),
        (
            EncoderConfig,
            {"architecture": {"embed_dim": 8, "vision_cfg": {"image_size": [8, 9]}, "text_cfg": {}}},
            "8x9",
        ),
    ],
)
def test_impossible_values_are_refused(section: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        section(**fields)
