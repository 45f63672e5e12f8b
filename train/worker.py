"""One process of a training gang. The same code under Ray, torchrun and Slurm.

    torchrun --nproc-per-node 2 -m train.worker JOB.json          RANK, WORLD_SIZE, MASTER_ADDR … from the launcher
    python -m train.worker JOB.json                               one process

    JOB.json   {"family", "model", "training", "seed", "inputs": {"images": URI, …}, "out": {"uri", "revision"}}
               and "validation_fraction" for CLIP

`out` is an artifact under construction (`cluster.workshop.Workshop`). A job that was killed goes on from the newest
checkpoint in its work folder; one that is done publishes nothing twice. Rank 0 commits the artifact's only shard.
"""

import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

if "DS_ACCELERATOR" not in os.environ and not Path("/dev/nvidiactl").exists():
    os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported

import deepspeed
import torch
import torch.distributed as dist

from cluster.errors import UnclipError, UserError
from cluster.workshop import Attempt, Workshop
from train.checkpoint import Checkpoints
from train.config import TrainingConfig
from train.family import Family, family_of
from train.inputs import Inputs, open_clip_inputs, open_model_inputs
from train.loop import Trained, train
from train.publish import HISTORY_FILE, averaged_weights, write_clip, write_history, write_model

Report = Callable[[dict[str, Any]], None]
CHECKPOINTS = "checkpoints"


def member(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Train what `payload` asks for, together with the other members of the gang. Returns numbers of this process."""
    started = time.perf_counter()
    device = join_gang()
    workshop = Workshop.from_plain(payload["out"])
    if workshop.receipt(0) is not None:
        return {"rows": 0, "steps": 0, "seconds": 0.0}
    name, seed = payload["family"], payload["seed"]
    family = family_of(name)
    model_config: Any = family.CONFIG.model_validate(payload["model"])
    training = TrainingConfig.model_validate(payload["training"])
    needs = family.needs(model_config)
    if needs.whole_batch and training.gradient_accumulation > 1:
        raise UserError(
            f"training.gradient_accumulation is {training.gradient_accumulation}; the loss of {name} compares the "
            "whole batch, so it needs 1 (use a smaller batch_size or more processes)"
        )
    validation_fraction = float(payload.get("validation_fraction", 0.0))
    if name == "clip":
        inputs = open_clip_inputs(payload["inputs"], model_config, training, needs, validation_fraction)
    else:
        inputs = open_model_inputs(payload["inputs"], training, needs, str(device))
    checkpoints = Checkpoints(workshop.work / CHECKPOINTS)
    try:
        outcome = train(
            family=family,
            model=fresh_model(family, model_config, inputs, seed),
            config=training,
            seed=seed,
            rows=inputs.rows,
            trained=_trained(payload, training, inputs),
            checkpoints=checkpoints,
            report=report,
            device=device,
        )
        if dist.get_rank() == 0:
            weights = averaged_weights(fresh_model(family, model_config, inputs, seed), outcome.checkpoint)
            with workshop.attempt(0) as attempt:
                if name == "clip":
                    write_clip(
                        attempt,
                        weights,
                        encoder=model_config,
                        training=training,
                        seed=seed,
                        inputs=inputs,
                        validation_fraction=validation_fraction,
                    )
                else:
                    write_model(
                        attempt,
                        weights,
                        family=name,
                        model=model_config,
                        training=training,
                        seed=seed,
                        inputs=inputs,
                    )
                _commit(attempt, outcome, inputs, seconds=time.perf_counter() - started)
            checkpoints.delete()
        dist.barrier()
    finally:
        inputs.rows.close()
        gc.collect()  # DeepSpeed's hooks and its engine refer to each other
    seconds = time.perf_counter() - started
    return {"rows": len(inputs.rows), "steps": outcome.timings.steps, "seconds": seconds, **asdict(outcome.timings)}


def join_gang() -> torch.device:
    """Join the process group that the environment describes, unless this process is in it already."""
    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, alone)
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        # Several processes on one machine: a second thread each would have them wait for each other's cores.
        torch.set_num_threads(1)
        # A C++ extension for inference only: DeepSpeed would compile it now, for minutes on a fresh machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        backend = "nccl" if on_gpu else "gloo"
        if "MASTER_PORT" in os.environ:
            dist.init_process_group(backend)
        else:
            if os.environ["WORLD_SIZE"] != "1":
                raise UserError("WORLD_SIZE is above 1 and MASTER_PORT is not set; start with torchrun, or set it")
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    return device


def fresh_model(family: Family, config: Any, inputs: Inputs, seed: int) -> torch.nn.Module:
    """The model before its first step: the same weights in every process, from the seed alone."""
    torch.manual_seed(seed)
    return family.build(config, inputs.facts)


def _trained(payload: dict[str, Any], training: TrainingConfig, inputs: Inputs) -> dict[str, Any]:
    """What is trained on what, for checkpoints. As JSON spells it, since it is compared with what was read back."""
    plain = {
        "family": payload["family"],
        "model": payload["model"],
        "training": training.content_settings(),
        "seed": payload["seed"],
        "inputs": inputs.digests,
        "rows": len(inputs.rows),
        "pair_ids": inputs.rows.table.sha256(),
    }
    result: dict[str, Any] = json.loads(json.dumps(plain))
    return result


def _commit(attempt: Attempt, outcome: Trained, inputs: Inputs, *, seconds: float) -> None:
    write_history(attempt.path(HISTORY_FILE), outcome.history)
    stats = {
        "seconds": seconds,
        "first_step": outcome.first,
        "world_size": dist.get_world_size(),
        "machine": platform.machine(),
        "timings": asdict(outcome.timings),
    }
    attempt.commit(rows=len(inputs.rows), counts={"steps": len(outcome.history)}, stats=stats)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m train.worker JOB.json")
    payload = json.loads(Path(sys.argv[1]).read_text())
    try:
        result = member(payload, _print_report)
        if dist.get_rank() == 0:
            print(json.dumps(result), flush=True)
    except UnclipError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _print_report(report: dict[str, Any]) -> None:
    if report.get("step", 0) % 50 == 0:
        print(json.dumps(report), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
