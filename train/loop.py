"""The training loop: one for every family.

    lanes ─► rows ─► batch ─┐
    draws ──────────────────┴► family.loss ─► engine.backward ─► engine.step ─► history, report, checkpoint

A step is a function of the weights, the optimizer's states and the step's number: data order, random draws and
learning rate are closed formulas of it. So a run that resumes from a checkpoint continues bit for bit at the same
number of processes, and follows the same curve at another.

History holds what equal runs have in common (loss, gradient norm, learning rate); times go to `report` only.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cluster.errors import UserError, WorkFailed
from train.checkpoint import Checkpoint, Checkpoints, History
from train.config import TrainingConfig
from train.data import TrainRows, prefetch
from train.draws import Draws
from train.family import Family
from train.lanes import Lanes, slots_of
from train.optimizer import build_optimizer, clips_itself
from train.shares import MASTER, prepare_states, set_updates, shares

Report = Callable[[dict[str, Any]], None]


@dataclass
class Timings:
    """Seconds by what they were spent on, over the steps of this process. No content."""

    data: float = 0.0
    step: float = 0.0
    checkpoint: float = 0.0
    steps: int = 0


@dataclass
class Trained:
    """A finished training run: its last checkpoint, which has the averaged weights, and the curve."""

    checkpoint: Checkpoint
    history: History
    timings: Timings
    first: int = 0  # the step that this process began at


class ThroughEngine:
    """A model as a family's loss sees it: called through DeepSpeed's engine, and with the module's own attributes.

    The engine by itself shadows some of them: its `config` is DeepSpeed's.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._engine(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine.module, name)


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then constant or a half cosine down to zero at the last step."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant" or step < config.warmup_steps:
        return config.learning_rate * warm
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def deepspeed_settings(config: TrainingConfig, world_size: int) -> dict[str, Any]:
    """Our section as DeepSpeed's JSON config."""
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size // world_size // config.gradient_accumulation,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "gradient_clipping": 0.0 if clips_itself(config) else config.gradient_clip,
        "zero_optimization": {"stage": config.deepspeed.zero_stage},
        # A client's optimizer, not DeepSpeed's: a config-named AdamW compiles a C++ extension on the first use.
        "zero_allow_untested_optimizer": True,
        # Without ZeRO it has no layout with bf16 weights and fp32 masters: there the weights stay fp32 and only
        # the products are bf16, by autocast.
        "bf16": {"enabled": config.deepspeed.precision == "bf16" and config.deepspeed.zero_stage > 0},
        "steps_per_print": 2**31,
    }


def train(
    *,
    family: Family,
    model: nn.Module,
    config: TrainingConfig,
    seed: int,
    rows: TrainRows,
    trained: dict[str, Any],
    checkpoints: Checkpoints,
    report: Report,
    device: torch.device,
) -> Trained:
    """Train `model` on `rows` up to `config.steps`, from the newest checkpoint if there is one.

    `trained` says what is trained on what (plain JSON); a checkpoint that says otherwise is refused.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    slots = slots_of(rank, world_size, config.batch_size)
    if len(slots) % config.gradient_accumulation:
        raise UserError(
            f"training.gradient_accumulation {config.gradient_accumulation} does not divide the {len(slots)} rows that "
            f"each of {world_size} processes has of batch_size {config.batch_size}"
        )
    lanes = Lanes(rows=len(rows), batch_size=config.batch_size, seed=seed, block_rows=config.block_rows)
    restored = _newest(checkpoints, trained)
    if restored is not None:
        _load_weights(model, restored)
    engine, *_ = deepspeed.initialize(
        model=model.to(device), optimizer=build_optimizer(model, config), config=deepspeed_settings(config, world_size)
    )
    prepare_states(engine)
    history: History = []
    first = 0
    if restored is not None:
        _load_states(engine, restored)
        history, first = restored.history(), restored.step
    timings = Timings()
    engine.train()
    batches = prefetch(rows, lanes, slots, range(first, config.steps))
    try:
        for step in range(first, config.steps):
            started = time.perf_counter()
            _, at, batch = next(batches)
            fetched = time.perf_counter()
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            record = _step(engine, family, config, seed, step, slots, batch, rows=rows, at=at)
            history.append(record)
            stepped = time.perf_counter()
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                _save(engine, checkpoints, step + 1, trained, history)
            timings.data += fetched - started
            timings.step += stepped - fetched
            timings.checkpoint += time.perf_counter() - stepped
            timings.steps += 1
            if rank == 0:
                seconds = max(stepped - started, 1e-9)
                report({"step": step + 1, "steps": config.steps, "loss": record["loss"],
                        "samples_per_s": config.batch_size / seconds})  # fmt: skip
    finally:
        batches.close()
        engine.destroy()
    return Trained(checkpoints.open(config.steps), history, timings, first)


def _step(
    engine: Any,
    family: Family,
    config: TrainingConfig,
    seed: int,
    step: int,
    slots: NDArray[np.int64],
    batch: dict[str, Tensor],
    *,
    rows: TrainRows,
    at: NDArray[np.int64],
) -> dict[str, float]:
    """One optimizer step. Returns its record for the history, equal on every rank."""
    rate = learning_rate_at(step, config)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    device = next(iter(batch.values())).device
    totals: dict[str, Tensor] = {}
    for part in np.array_split(np.arange(len(slots)), config.gradient_accumulation):
        draws = Draws(seed, step, slots[part], device)
        torch.manual_seed(draws.torch_seed())
        micro = {name: tensor[int(part[0]) : int(part[-1]) + 1] for name, tensor in batch.items()}
        with _autocast(config, device):
            loss, metrics = family.loss(ThroughEngine(engine), micro, draws)
        means = _means({"loss": loss.detach(), **metrics})
        # Before backward: a loss that is no number must not reach the weights.
        if not math.isfinite(means["loss"]):
            raise _not_finite(step, float(loss.detach()), means["loss"], rows, at[part])
        engine.backward(loss)
        engine.step()
        for name, value in means.items():
            totals[name] = totals.get(name, 0.0) + value / config.gradient_accumulation  # type: ignore[assignment]
    record = {"step": step + 1, "samples": (step + 1) * config.batch_size, "learning_rate": rate}
    return {**record, "grad_norm": float(engine.get_global_grad_norm()), **totals}  # type: ignore[dict-item]


def _means(scalars: dict[str, Tensor]) -> dict[str, float]:
    """Each scalar's mean over the ranks, in one exchange."""
    names = ["loss", *sorted(name for name in scalars if name != "loss")]
    values = torch.stack([scalars[name].detach().float().reshape(()) for name in names])
    dist.all_reduce(values)
    return dict(zip(names, (values / dist.get_world_size()).tolist(), strict=True))


def _not_finite(step: int, here: float, mean: float, rows: TrainRows, at: NDArray[np.int64]) -> WorkFailed:
    """The error of a loss that is no number: the rows of the ranks where it arose."""
    mine = [] if math.isfinite(here) else rows.table.pair_ids(at.tolist())
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    pair_ids = [pair_id for part in everyone for pair_id in part]
    shown = ", ".join(pair_ids[:8]) + (f" and {len(pair_ids) - 8} more" if len(pair_ids) > 8 else "")
    return WorkFailed(
        f"the loss is {mean} at step {step + 1}, on the rows with pair_id {shown}. The weights before it are in the "
        "last checkpoint. Look at these rows, or lower training.learning_rate or training.gradient_clip."
    )


@contextmanager
def _autocast(config: TrainingConfig, device: torch.device) -> Iterator[None]:
    """bf16 weights meet fp32 timesteps and noise: autocast brings the operands of a product together."""
    if config.deepspeed.precision == "fp32":
        yield
        return
    # On a CPU with AMX the backward of bf16 flash attention takes five times as long as plain products.
    attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    with torch.autocast(device.type, dtype=torch.bfloat16), attention:
        yield


def _newest(checkpoints: Checkpoints, trained: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint to go on from: rank 0 looks and checks hashes, and the others take its word."""
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        checkpoint, passed_over = checkpoints.newest()
        for reason in passed_over:
            print(f"checkpoint passed over: {reason}", flush=True)
        found = [None if checkpoint is None else checkpoint.step, _difference(checkpoint, trained)]
    dist.broadcast_object_list(found, src=0)
    step, difference = found
    if difference is not None:
        raise UserError(
            f"{checkpoints.folder.uri} has checkpoints of another training run ({difference}). "
            "Train into another folder, or delete these checkpoints to start anew."
        )
    return None if step is None else checkpoints.open(step)


def _difference(checkpoint: Checkpoint | None, trained: dict[str, Any]) -> str | None:
    if checkpoint is None or checkpoint.trained == trained:
        return None
    fields = sorted(
        key for key in trained.keys() | checkpoint.trained.keys() if trained.get(key) != checkpoint.trained.get(key)
    )

    def short(value: Any) -> str:
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}…"

    return "; ".join(
        f"{key}: {short(checkpoint.trained.get(key))} there, {short(trained.get(key))} here" for key in fields
    )


def _load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(checkpoint.parameter(MASTER, name, parameter.shape))


def _load_states(engine: Any, checkpoint: Checkpoint) -> None:
    """Fill what this rank owns; in bf16 also the fp32 weights, which the module's own cannot carry."""
    with torch.no_grad():
        for share in shares(engine):
            for state, tensor in share.tensors.items():
                tensor.copy_(checkpoint.read(state, share.name, share.start, share.length))
    set_updates(engine, checkpoint.step)


def _save(engine: Any, checkpoints: Checkpoints, step: int, trained: dict[str, Any], history: History) -> None:
    written = checkpoints.write_share(step, dist.get_rank(), dist.get_world_size(), shares(engine))
    files: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(files, written)
    if dist.get_rank() == 0:
        checkpoints.complete(step, dict(files), trained=trained, history=history)
    dist.barrier()  # nobody goes on, and perhaps dies, while another still thinks that the checkpoint is being made
