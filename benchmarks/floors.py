"""The floor of each stage: what its result costs with nothing of ours around it.

Every `prepare_*` reads what it needs from a finished run's artifacts and returns the work to be timed
(benchmarks/processes.py). Everything is on the CPU, with one torch thread a process.

Shapes: B batch, N training rows, E evaluation rows, D embedding dimension.
"""

import os
import shutil
import statistics
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.processes import Prepare, Work, timed
from cluster.artifact import Artifact
from embed.cache import EmbeddingCache, open_cache
from embed.clip import load_encoder
from embed.stored_rows import open_pictures, stored_rows
from embed.view import training_rows
from ingest.decode import decode
from ingest.filters import Filters
from pipeline.config import RunConfig
from train.draws import Draws
from train.family import family_of
from train.inputs import open_clip_inputs, open_model_inputs
from train.lanes import Lanes, slots_of
from train.sample.heldout import heldout_sets
from train.sample.stack import Stack
from train.sample.stage import batches_of, draw_batch

FAMILY_OF_STAGE = {
    "clip": "clip",
    "prior": "prior_diffusion",
    "decoder": "decoder",
    "upsampler_256": "upsampler",
    "upsampler_1024": "upsampler",
}
STEPS_A_LAP, WARM_STEPS, WARM_PICTURES = 12, 3, 8


@dataclass(frozen=True)
class Floor:
    name: str
    what: str
    prepare: Prepare


def kind_of(stage: str) -> str:
    """`images` of `evaluation/copies/images`."""
    return stage.rsplit("/", 1)[-1]


def processes_of(stage: str, config: RunConfig, artifact: Artifact) -> int:
    """How many processes the stage worked in."""
    kind = kind_of(stage)
    if kind in ("images", "embeddings"):
        return min(config.cluster.shard_actors, artifact.shard_count)
    if kind == "samples" or (kind in FAMILY_OF_STAGE and not (kind == "clip" and config.clip.training is None)):
        return config.cluster.gang_size
    return 1


def floors_of(stage: str, config: RunConfig) -> list[Floor]:
    """The floors of a stage, the one that its ratio is taken of first; none for a stage that has none."""
    kind = kind_of(stage)
    copy = Floor("copy", "a copy of the artifact's bytes, with fsync", prepare_copy)
    if kind in ("pairs", "view") or (kind == "clip" and config.clip.training is None):
        return [copy]
    if kind == "images":
        return [
            Floor("decode", "decoding, resizing, encoding of the stored pictures, bytes in memory", prepare_decode),
            copy,
        ]
    if kind in FAMILY_OF_STAGE:
        return [
            Floor("steps", "its steps × the median bare step: loss, backward, fused AdamW on one batch", prepare_steps)
        ]
    others = {
        "embeddings": Floor("forward", "both towers' forwards, pixels and tokens in memory", prepare_forward),
        "dedup": Floor("product", "float32 products of all training with all evaluation vectors", prepare_product),
        "pca": Floor("eigh", "the view's rows: float64 product, eigh", prepare_eigen),
        "samples": Floor(
            "networks", "time inside the networks' modules, same captions, batches and seeds", prepare_networks
        ),
    }
    return [others[kind]] if kind in others else []


def prepare_copy(config: RunConfig, run: str, stage: str, rank: int, processes: int) -> Work:
    artifact = Artifact.open(f"{run}/{stage}")
    names = [entry.name for shard in artifact.shards for entry in shard.files]
    paths = [artifact.file(name) for name in names[rank::processes]]

    def copy(folder: Path) -> None:
        for number, path in enumerate(paths):
            with path.open("rb") as source, (folder / str(number)).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
                target.flush()
                os.fsync(target.fileno())

    def work() -> float:
        with tempfile.TemporaryDirectory(dir=Path(run).parent) as folder:  # the same file system as the run's
            return timed(lambda: copy(Path(folder)))

    work()
    return work


def prepare_decode(config: RunConfig, run: str, stage: str, rank: int, processes: int) -> Work:
    images = Artifact.open(f"{run}/{stage}")
    bodies: list[bytes] = []
    for shard in range(images.shard_count):
        with images.file(f"{shard:08d}.tar").open("rb") as tar:
            for row in stored_rows(images, shard):
                tar.seek(row.offset)
                bodies.append(tar.read(row.length))
    mine = bodies[rank::processes]
    filters = Filters(config.images.filters, {})

    def encode(some: list[bytes]) -> None:
        for body in some:
            decode(body, config.images, filters)

    encode(mine[:WARM_PICTURES])
    return lambda: timed(lambda: encode(mine))


def prepare_steps(config: RunConfig, run: str, stage: str, rank: int, processes: int) -> Work:
    """Bare steps on the first batch's rows of this process. CLIP's negatives are those rows only: nothing gathers."""
    torch.set_num_threads(1)
    section = getattr(config, stage)
    family, training = family_of(FAMILY_OF_STAGE[stage]), section.training
    model_config = section.encoder if stage == "clip" else section.model
    uris = {name: f"{run}/{name}" for name in ("images", "clip", "embeddings", "view", "pca")}
    needs = family.needs(model_config)
    if stage == "clip":
        inputs = open_clip_inputs(uris, model_config, training, needs, config.view.validation_fraction)
    else:
        inputs = open_model_inputs(uris, training, needs, "cpu")
    lanes = Lanes(rows=len(inputs.rows), batch_size=training.batch_size, seed=0, block_rows=training.block_rows)
    slots = slots_of(rank, processes, training.batch_size)
    batch = inputs.rows.batch(lanes.at(0, slots).row)
    inputs.rows.close()
    torch.manual_seed(0)
    model = family.build(model_config, inputs.facts).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), training.learning_rate, training.betas, training.eps, training.weight_decay, fused=True
    )
    parts = np.array_split(np.arange(len(slots)), training.gradient_accumulation)
    bf16 = training.deepspeed.precision == "bf16"

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for part in parts:
            micro = {name: tensor[int(part[0]) : int(part[-1]) + 1] for name, tensor in batch.items()}
            with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext():
                loss, _ = family.loss(model, micro, Draws(0, 0, slots[part]))
            torch.autograd.backward(loss)
        optimizer.step()

    for _ in range(WARM_STEPS):
        step()
    steps = int(Artifact.open(f"{run}/{stage}").stats(0)["timings"]["steps"])  # a resumed stage made fewer
    return lambda: steps * statistics.median(timed(step) for _ in range(STEPS_A_LAP))


def prepare_forward(config: RunConfig, run: str, stage: str, rank: int, processes: int) -> Work:
    settings = config.embeddings
    torch.set_num_threads(settings.threads)
    encoder = load_encoder(f"{run}/clip", precision=settings.precision)
    images = Artifact.open(f"{run}/{stage.removesuffix('embeddings')}images")
    whole = []
    for shard in range(images.shard_count):
        rows = stored_rows(images, shard)
        whole += [
            (shard, rows[start : start + settings.batch_size]) for start in range(0, len(rows), settings.batch_size)
        ]
    batches = []
    for shard, rows in whole[rank::processes]:
        pixels_BHWC = np.zeros((settings.batch_size, encoder.image_size, encoder.image_size, 3), dtype=np.uint8)
        with open_pictures(images, shard) as pictures:
            for index, row in enumerate(rows):
                pixels_BHWC[index] = encoder.preprocess(pictures.read(row))
        tokens_BT, _ = encoder.tokenize([row.text for row in rows] + [""] * (settings.batch_size - len(rows)))
        batches.append((torch.from_numpy(pixels_BHWC), tokens_BT))

    def encode(some: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        with torch.inference_mode():
            for pixels_BHWC, tokens_BT in some:
                encoder.encode_image(pixels_BHWC)
                encoder.encode_text(tokens_BT)

    encode(batches[:1])
    return lambda: timed(lambda: encode(batches))


def prepare_product(config: RunConfig, run: str, stage: str, rank: int, processes: int) -> Work:
    training_ND = _vectors(open_cache(f"{run}/embeddings"))
    sets = [open_cache(f"{run}/evaluation/{item.name}/embeddings") for item in config.evaluation_sets]
    filled = [_vectors(cache) for cache in sets if cache.rows]
    evaluation_DE = np.concatenate([np.zeros((0, training_ND.shape[1]), np.float32), *filled]).T
    rows = config.dedup.batch_rows

    def multiply() -> None:
        for start in range(0, len(training_ND), rows):
            training_ND[start : start + rows] @ evaluation_DE

    multiply()
    return lambda: timed(multiply)


def prepare_eigen(config: RunConfig, run: str, stage: str, rank: int, processes: int) -> Work:
    cache, view = open_cache(f"{run}/embeddings"), Artifact.open(f"{run}/view")
    parts = [cache.vectors(shard, "image_embedding")[training_rows(view, shard)] for shard in range(cache.shard_count)]
    x_ND = np.concatenate(parts).astype(np.float64)
    centred_ND = x_ND - x_ND.mean(axis=0)

    def decompose() -> None:
        np.linalg.eigh(centred_ND.T @ centred_ND / len(centred_ND))

    decompose()
    return lambda: timed(decompose)


def prepare_networks(config: RunConfig, run: str, stage: str, rank: int, processes: int) -> Work:
    torch.set_num_threads(1)
    names = ["clip", "pca", "embeddings", "view", *(name for name in FAMILY_OF_STAGE if name != "clip")]
    names += [f"evaluation/{item.name}/embeddings" for item in config.evaluation_sets]
    uris = {name: f"{run}/{name}" for name in names}
    drawn = [each.distinct(config.samples.captions) for each in heldout_sets(uris, config.samples)]
    batches = batches_of(drawn, config.samples, config.seed)[rank::processes]
    stack = Stack.open(uris, config.samples)
    clip: Any = stack.encoder
    clock = _Clock([clip._model, stack.prior, stack.decoder, *stack.upsamplers.values()])

    def work() -> float:
        before = clock.seconds
        for batch in batches:
            draw_batch(stack, batch)
        return clock.seconds - before

    for batch in batches[:1]:
        draw_batch(stack, batch)
    return work


class _Clock:
    """Seconds spent inside networks. Samplers and CLIP also call a network's parts by themselves: those count too."""

    def __init__(self, networks: list[nn.Module]) -> None:
        self.seconds = 0.0
        self._depth = 0
        self._entered = 0.0
        for network in networks:
            for module in (network, *network.children()):
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)

    def _enter(self, *_: object) -> None:
        if self._depth == 0:
            self._entered = time.perf_counter()
        self._depth += 1

    def _leave(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.perf_counter() - self._entered


def _vectors(cache: EmbeddingCache) -> np.ndarray[Any, np.dtype[np.float32]]:
    shards = [cache.vectors(shard, "image_embedding") for shard in range(cache.shard_count)]
    return np.concatenate(shards).astype(np.float32)
