"""How many rows, bytes and files each stage will have, before any of them runs.

Every row is counted as if its picture arrived, so these are numbers to make room for, not to expect. What pictures
take was measured (Pillow 12, November 2026) on drawings (the Noto emoji) and on noise with the spectrum of photographs
(amplitude 1/f), at 64 to 512 pixels: per pixel, drawings take a quarter of what such noise does, and photographs lie
between; the geometric mean is taken (25 kB at 256 pixels and quality 95). One source may differ from it twofold.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cluster.errors import UserError
from embed.architecture import dimension
from ingest.config import ImagesConfig
from ingest.scene_server import scene_rows
from pipeline.config import RunConfig
from pipeline.sources import RunSources

Plain = dict[str, Any]

# Bits a pixel at 256 × 256, by quality; between them, linear. PNG has no quality.
BITS_PER_PIXEL: dict[str, tuple[tuple[int, float], ...]] = {
    "jpg": ((1, 0.3), (50, 1.0), (75, 1.5), (85, 1.9), (95, 3.1), (100, 5.5)),
    "webp": ((1, 0.2), (50, 0.75), (75, 0.97), (95, 2.1), (100, 2.6)),
    "png": ((1, 8.3), (100, 8.3)),
}
SMALLER_ARE_DENSER = 0.45  # bits a pixel go with size to this power, downwards
PICTURE_HEADER_BYTES = 600
SCENES_SHARE = 0.3  # the built-in scenes are flat colours
KEEP_RATIO_AREA = 1.35  # pixels of a picture of which only the smaller side is `size`: sides of 3 to 4 are usual
TAR_ROW_BYTES = 3_500  # three headers, caption and JSON, each filled up to 512
LEDGER_ROW_BYTES, PAIRS_ROW_BYTES, EMBEDDINGS_ROW_BYTES, VIEW_ROW_BYTES = 140, 60, 235, 22
WEIGHT_BYTES = 4
CHECKPOINT_BYTES, CHECKPOINTS_AT_ONCE = 16, 3  # weights, average and two moments; two are kept while a third is written
FILES_BESIDE = 6  # manifest, request, table of shards, their folders


@dataclass(frozen=True)
class StageEstimate:
    """What a stage leaves, and what it needs for a while beside that. None where it is not known before it runs."""

    rows: int | None = None
    shards: int | None = None
    bytes: int | None = None
    files: int | None = None
    scratch_bytes: int = 0

    def plain(self) -> Plain:
        return {"rows": self.rows, "bytes": self.bytes, "files": self.files, "scratch_bytes": self.scratch_bytes}


def picture_bytes(images: ImagesConfig, *, scenes: bool = False) -> int:
    """About how many bytes a stored picture has."""
    pixels = images.size**2 * (KEEP_RATIO_AREA if images.resize == "keep_ratio" else 1.0)
    bits = _between(BITS_PER_PIXEL[images.format], images.quality) * (256 / images.size) ** SMALLER_ARE_DENSER
    return int(PICTURE_HEADER_BYTES + pixels * bits / 8 * (SCENES_SHARE if scenes else 1.0))


def source_rows(config: RunConfig, sources: RunSources) -> tuple[dict[str, int], list[str]]:
    """Rows of each `pairs` artifact whose source can be opened, and why those of the others are not known."""
    rows, unknown = {}, []
    scenes = config.source.scenes
    sets: dict[str, Any] = {"pairs": "training" if scenes else None}
    sets |= {f"evaluation/{item.name}/pairs": item.scenes for item in config.evaluation_sets}
    for name, set_name in sets.items():
        if set_name is not None and scenes is not None:
            rows[name] = scene_rows(scenes, set_name)
        elif name == "pairs" and config.source.pairs is None and config.source.folder is None:
            unknown.append("pairs: source.pairs is not set")
        else:
            try:
                rows[name] = sources.open(name).estimate().rows
            except UserError as error:
                unknown.append(f"{name}: {error}")
    return rows, unknown


def estimate_data(config: RunConfig, rows: dict[str, int]) -> dict[str, StageEstimate]:
    """The stages whose size goes with the rows. Needs no torch."""
    found = {}
    for pairs, count in rows.items():
        prefix, shards = pairs.removesuffix("pairs"), -(-count // config.images.shard_rows)
        picture = picture_bytes(config.images, scenes=config.source.scenes is not None)
        image_row = picture + TAR_ROW_BYTES + LEDGER_ROW_BYTES
        vector = 2 * dimension(config.clip.encoder.model_cfg())
        found[pairs] = _sharded(count, shards, PAIRS_ROW_BYTES, 1)
        found[f"{prefix}images"] = _sharded(count, shards, image_row, 2)
        found[f"{prefix}embeddings"] = _sharded(count, shards, 2 * vector + EMBEDDINGS_ROW_BYTES, 1)
        if not prefix:
            found["view"] = _sharded(count, shards, VIEW_ROW_BYTES, 1)
    return found


def estimate_model(parameters: int, *, trained: bool) -> StageEstimate:
    scratch = CHECKPOINT_BYTES * CHECKPOINTS_AT_ONCE * parameters if trained else 0
    return StageEstimate(None, 1, WEIGHT_BYTES * parameters, FILES_BESIDE + 4, scratch)


def _sharded(rows: int, shards: int, row_bytes: int, files_a_shard: int) -> StageEstimate:
    return StageEstimate(rows, shards, rows * row_bytes, shards * (files_a_shard + 1) + FILES_BESIDE)


def _between(points: tuple[tuple[int, float], ...], at: float) -> float:
    for (low, below), (high, above) in pairwise(points):
        if at <= high:
            return below + (above - below) * (at - low) / (high - low)
    return points[-1][1]
