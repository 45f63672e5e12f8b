"""What a training run leaves: averaged weights, what they are, and the curve.

    CLIP          model.safetensors  encoder.json  seen.json  history.parquet
    the others    model.safetensors  config.json              history.parquet

Bytes depend on content only: settings, inputs by digest, weights. Where and how fast it ran is in the receipt.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
from safetensors.torch import save_file
from torch import Tensor, nn

from cluster.canonical import canonical_json
from cluster.parquet import write_table
from cluster.settings import Section
from cluster.workshop import Attempt
from embed.clip import save_encoder
from embed.config import EncoderConfig
from embed.description import ENCODER_FILE, WEIGHTS_FILE
from train.checkpoint import Checkpoint, History
from train.config import TrainingConfig
from train.families.clip import preprocessing_of, published
from train.inputs import Inputs, model_cfg_of

CONFIG_FILE, HISTORY_FILE, SEEN_FILE = "config.json", "history.parquet", "seen.json"
INTEGERS = ("step", "samples")


def averaged_weights(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The model's state dict with the averaged weights of the checkpoint. `model` is one that was never partitioned."""
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = model.state_dict(keep_vars=True)
    return {
        name: checkpoint.parameter("ema", names[id(value)], value.shape) if id(value) in names else value.detach()
        for name, value in state.items()
    }


def write_clip(
    attempt: Attempt,
    weights: dict[str, Tensor],
    *,
    encoder: EncoderConfig,
    training: TrainingConfig,
    seed: int,
    inputs: Inputs,
    validation_fraction: float,
) -> None:
    table = inputs.rows.table
    save_encoder(
        published(weights),
        weights_path=attempt.path(WEIGHTS_FILE),
        encoder_path=attempt.path(ENCODER_FILE),
        model_cfg=model_cfg_of(encoder, inputs.facts),
        vocabulary=inputs.vocabulary,
        preprocessing=preprocessing_of(encoder),
        made={"by": "training", "training": training.content_settings(), "seed": seed, "inputs": inputs.digests},
    )
    seen = {
        "images": inputs.digests["images"],
        "validation_fraction": validation_fraction,
        "rows": len(table),
        "left_out": table.left_out,
        "pair_ids_sha256": table.sha256(),
        "samples": training.steps * training.batch_size,
    }
    attempt.path(SEEN_FILE).write_bytes(canonical_json(seen) + b"\n")


def write_model(
    attempt: Attempt,
    weights: dict[str, Tensor],
    *,
    family: str,
    model: Section,
    training: TrainingConfig,
    seed: int,
    inputs: Inputs,
) -> None:
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in sorted(weights.items())}
    save_file(contiguous, attempt.path(WEIGHTS_FILE))
    config = {
        "format": 1,
        "family": family,
        "model": model.model_dump(mode="json"),
        "facts": dataclasses.asdict(inputs.facts),
        "training": training.content_settings(),
        "seed": seed,
        "inputs": inputs.digests,
        "rows": len(inputs.rows),
    }
    attempt.path(CONFIG_FILE).write_bytes(canonical_json(config) + b"\n")


def write_history(path: Path, history: History) -> None:
    """One row a step: step, loss, grad_norm, learning_rate, samples, then what the family records."""
    first = ["step", "loss", "grad_norm", "learning_rate", "samples"]
    names = first + sorted(history[0].keys() - set(first))
    columns: dict[str, Any] = {
        name: pa.array(
            [int(row[name]) if name in INTEGERS else row[name] for row in history],
            pa.int64() if name in INTEGERS else pa.float64(),
        )
        for name in names
    }
    write_table(path, pa.table(columns))
