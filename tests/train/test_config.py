"""What the training sections refuse, and what belongs to a trained model's identity."""

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from train.config import ClipConfig, TrainingConfig

TRAINING: dict[str, Any] = {"steps": 10, "batch_size": 8, "learning_rate": 0.001}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 9, "gradient_accumulation": 2}, "batch_size 9 is not a multiple of gradient_accumulation 2"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0\.9, 1\.0\)"),
        ({"deepspeed": {"zero_stage": 4}}, "zero_stage"),
        ({"deepspeed": {"stage": 1}}, "stage"),
        ({"stepps": 3}, "stepps"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainingConfig.model_validate(TRAINING | changes)


def test_a_clip_is_loaded_or_trained() -> None:
    weights = {"encoder": {"weights": "x.safetensors"}}
    assert ClipConfig.model_validate(weights).training is None
    with pytest.raises(ValidationError, match="both are given"):
        ClipConfig.model_validate(weights | {"training": TRAINING})
    with pytest.raises(ValidationError, match="neither is given"):
        ClipConfig.model_validate({})


def test_a_contrastive_loss_refuses_gradient_accumulation() -> None:
    with pytest.raises(ValidationError, match="contrastive loss compares the whole batch"):
        ClipConfig.model_validate({"training": TRAINING | {"gradient_accumulation": 2}})


def test_how_a_run_is_carried_out_is_no_part_of_what_it_makes() -> None:
    plain = TrainingConfig.model_validate(TRAINING).content_settings()
    how = {"checkpoint_every": 7, "cache_bytes": 0, "gradient_accumulation": 2, "deepspeed": {"zero_stage": 3}}
    assert TrainingConfig.model_validate(TRAINING | how).content_settings() == plain
    for what in ({"steps": 11}, {"block_rows": 3}, {"deepspeed": {"precision": "bf16"}}):
        assert TrainingConfig.model_validate(TRAINING | what).content_settings() != plain


def test_settings_load_without_torch() -> None:
    code = "import sys, train.config; assert not {'torch', 'numpy', 'ray', 'deepspeed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
