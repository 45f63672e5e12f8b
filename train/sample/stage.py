"""The `samples` stage: pictures of captions that training never saw, and what they score.

    grid.png           a card a caption, a picture a mode
    pictures.parquet   set, mode, caption, seed, png: the last model's picture, in (set, mode, caption) order
    scores.json        oracle's accuracies (scenes only), the linear probe's, CLIP's retrieval, settings

The work is cut into batches whose make-up depends on the settings alone, and the batches are dealt to the gang's
members: so the pictures are the same bytes for every number of processes. A caption has one seed for all its modes.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from cluster.canonical import canonical_json
from cluster.parquet import write_table
from cluster.workshop import Workshop
from train.evaluate.accuracy import accuracy, scenes_of
from train.evaluate.probe import fit_probes, probe_table
from train.evaluate.retrieval import retrieval
from train.families.config import SamplesConfig
from train.sample.grid import Card, GridSection, draw_grid, png_bytes
from train.sample.heldout import CaptionSet, heldout_sets, training_set
from train.sample.stack import Mode, Stack

Report = Callable[[dict[str, Any]], None]
PICTURES_SCHEMA = pa.schema(
    [("set", pa.string()), ("mode", pa.string()), ("caption", pa.string()), ("seed", pa.int64()), ("png", pa.binary())]
)
MODE_LABELS: dict[Mode, str] = {
    "prior": "prior's z_i",
    "text_embedding": "z_t in its place",
    "caption": "caption alone",
}
RETRIEVAL_ROWS, PROBE_ROWS = 1_000, 20_000
GRID_COLUMNS, GRID_PICTURE = 3, 144


@dataclass(frozen=True)
class Batch:
    """Consecutive captions of one set in one mode."""

    set_index: int
    mode: Mode
    start: int
    captions: list[str]
    seeds: list[int]


@dataclass(frozen=True)
class Result:
    batch: Batch
    pictures: NDArray[np.uint8]  # (B, H, W, 3)
    decoded: NDArray[np.uint8]  # the decoder's own, before the upsamplers
    z_i: NDArray[np.float32] | None


def member(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Gang member. Payload: `config` (SamplesConfig), `seed`, `inputs` (URIs by artifact), `out` (the workshop)."""
    from train.worker import join_gang

    started = time.perf_counter()
    device = join_gang()
    workshop = Workshop.from_plain(payload["out"])
    if workshop.receipt(0) is not None:
        return {"rows": 0, "seconds": 0.0}
    config = SamplesConfig.model_validate(payload["config"])
    sets = heldout_sets(payload["inputs"], config)
    drawn = [each.distinct(config.captions) for each in sets]
    batches = batches_of(drawn, config, payload["seed"])
    rank, world_size = dist.get_rank(), dist.get_world_size()
    stack = Stack.open(payload["inputs"], config, device=str(device))
    mine = list(range(rank, len(batches), world_size))
    results: list[tuple[int, Result]] = []
    total = sum(len(batch.captions) for batch in batches)
    for index in mine:
        results.append((index, draw_batch(stack, batches[index])))
        done = sum(len(batch.captions) for batch in batches[: min(len(batches), index - rank + world_size)])
        report({"done": done, "total": total, "unit": "pictures"})
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, results)
    if rank == 0:
        ordered = [result for _, result in sorted((pair for part in gathered for pair in part), key=lambda p: p[0])]
        scores = scores_of(sets, drawn, ordered, payload["inputs"])
        scores["sizes"], scores["captions"] = stack.sizes, config.captions
        with workshop.attempt(0) as attempt:
            table = pictures_table(drawn, ordered)
            write_table(attempt.path("pictures.parquet"), table)
            attempt.path("grid.png").write_bytes(png_bytes(grid_of(drawn, ordered, config)))
            attempt.path("scores.json").write_bytes(canonical_json(scores) + b"\n")
            attempt.commit(
                rows=table.num_rows,
                counts={"pictures": table.num_rows},
                stats={
                    "seconds": time.perf_counter() - started,
                    "world_size": world_size,
                },
            )
    dist.barrier()
    return {"rows": sum(len(result.batch.captions) for _, result in results), "seconds": time.perf_counter() - started}


def sample_captions(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """A grid of the full stack's pictures of any captions.

    Payload: `config`, `captions`, `seed`, `inputs`, `out` (path of the PNG). Picture i is drawn from seed + i.
    """
    config = SamplesConfig.model_validate(payload["config"])
    captions, seed = list(payload["captions"]), int(payload["seed"])
    device = "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"
    stack = Stack.open(payload["inputs"], config, device=device)
    cards: list[Card] = []
    for start in range(0, len(captions), config.batch_size):
        here = captions[start : start + config.batch_size]
        drawn = stack.draw(here, [seed + start + index for index in range(len(here))])
        cards += [Card(caption, [("", picture)]) for caption, picture in zip(here, drawn.final, strict=True)]
        report({"done": len(cards), "total": len(captions), "unit": "pictures"})
    page = draw_grid([GridSection("", cards)], columns=4, picture_size=256)
    Path(payload["out"]).write_bytes(png_bytes(page))
    return {"rows": len(cards)}


def batches_of(sets: Sequence[CaptionSet], config: SamplesConfig, seed: int) -> list[Batch]:
    batches = []
    for set_index, each in enumerate(sets):
        for mode in config.modes:
            for start in range(0, len(each), config.batch_size):
                here = each.captions[start : start + config.batch_size]
                seeds = [caption_seed(seed, each.name, start + index) for index in range(len(here))]
                batches.append(Batch(set_index, mode, start, here, seeds))
    return batches


def caption_seed(seed: int, set_name: str, index: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{set_name}:{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def draw_batch(stack: Stack, batch: Batch) -> Result:
    drawn = stack.draw(batch.captions, batch.seeds, batch.mode)
    return Result(batch, drawn.final, drawn.pictures["decoder"], drawn.z_i)


def scores_of(
    sets: Sequence[CaptionSet], drawn: Sequence[CaptionSet], results: Sequence[Result], uris: dict[str, str]
) -> dict[str, Any]:
    """{"oracle", "probe": by set or null, "retrieval": by set}."""
    scores: dict[str, Any] = {
        "oracle": {},
        "probe": {},
        "retrieval": {
            each.name: retrieval(each.z_i[:RETRIEVAL_ROWS], each.z_t[:RETRIEVAL_ROWS], each.captions[:RETRIEVAL_ROWS])
            | {"rows": min(len(each), RETRIEVAL_ROWS)}
            for each in sets
        },
    }
    scenes_by_set = [scenes_of(each.captions) for each in drawn]
    if not any(scenes_by_set):
        return scores | {"oracle": None, "probe": None}
    training = training_set(uris, rows=PROBE_ROWS)
    training_scenes = scenes_of(training.captions)
    probes = fit_probes(training.z_i, training_scenes) if training_scenes else None
    for set_index, (each, scenes) in enumerate(zip(drawn, scenes_by_set, strict=True)):
        if scenes is None:
            continue
        scores["oracle"][each.name] = {}
        embeddings = {"z_i": each.z_i, "z_t": each.z_t}
        for mode in MODE_LABELS:
            here = [r for r in results if r.batch.set_index == set_index and r.batch.mode == mode]
            if not here:
                continue
            scores["oracle"][each.name][mode] = {
                "final": accuracy([picture for result in here for picture in result.pictures], scenes),
                "decoder": accuracy([picture for result in here for picture in result.decoded], scenes),
            }
            if mode == "prior":
                embeddings["prior"] = np.concatenate([result.z_i for result in here if result.z_i is not None])
        if probes:
            scores["probe"][each.name] = probe_table(probes, embeddings, scenes)
    return scores


def pictures_table(sets: Sequence[CaptionSet], results: Sequence[Result]) -> pa.Table:
    rows = [
        {
            "set": sets[r.batch.set_index].name,
            "mode": r.batch.mode,
            "caption": caption,
            "seed": seed,
            "png": png_bytes(p),
        }
        for r in results
        for caption, seed, p in zip(r.batch.captions, r.batch.seeds, r.pictures, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=PICTURES_SCHEMA)


def grid_of(sets: Sequence[CaptionSet], results: Sequence[Result], config: SamplesConfig) -> Any:
    sections = []
    for set_index, each in enumerate(sets):
        by_mode: dict[Mode, list[NDArray[np.uint8]]] = {mode: [] for mode in config.modes}
        for result in results:
            if result.batch.set_index == set_index:
                by_mode[result.batch.mode] += list(result.pictures)
        cards = [
            Card(caption, [(MODE_LABELS[mode], pictures[row]) for mode, pictures in by_mode.items()])
            for row, caption in enumerate(each.captions[: config.shown])
        ]
        sections.append(GridSection(each.name.replace("_", " "), cards))
    return draw_grid(sections, columns=GRID_COLUMNS, picture_size=GRID_PICTURE)
