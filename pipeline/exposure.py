"""Which models saw a row that is being removed: the published ones and the checkpoints of those in training.

A row was seen where it was ok and in the part that trains: for CLIP outside the validation split, for the others in
the view and its training split. Told before anything is amended, since the ledger forgets what it erases.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.artifact import Artifact, Manifest, read_manifest
from cluster.storage import Folder
from embed.split import TRAIN, is_validation
from ingest.outcome import Status
from ingest.removal import Tombstones
from pipeline.amendment import read_columns

Plain = dict[str, Any]
MODELS = ("clip", "prior", "decoder", "upsampler_256", "upsampler_1024")
_CHECKPOINT = "checkpoint.json"


def ok_pairs(folder: Folder, tombstones: Tombstones) -> pa.Array:
    """The training pairs with a tombstone whose pictures are (still) in the images."""
    manifest = read_manifest(folder / "images")
    found: list[bytes] = []
    if manifest is not None:
        for _, table in read_columns(Artifact(folder / "images", manifest), ["pair_id", "status"]):
            here = tombstones.rows(table["pair_id"]) & np.asarray(pc.equal(table["status"], Status.OK), dtype=np.bool_)
            found += table["pair_id"].filter(pa.array(here)).to_pylist()
    return pa.array(found, pa.binary(16))


def models_that_saw(folder: Folder, seen: pa.Array) -> list[Plain]:
    """[{"model", "at", "rows", "exact"}]: `at` is `revision 1` or `step 400`; `exact` is false where the model was
    trained on an earlier state of its input than the one that the rows are counted in."""
    if not len(seen):
        return []
    in_view = _rows_in_view(folder, seen)
    found = []
    for model in MODELS:
        for at, digests, settings in _trained(folder / model):
            source, rows = ("images", _rows_of_clip(seen, settings)) if model == "clip" else ("view", in_view)
            manifest = read_manifest(folder / source)
            exact = manifest is not None and digests.get(source) == manifest.content_digest
            if rows:
                found.append({"model": model, "at": at, "rows": rows, "exact": exact})
    return found


def _rows_in_view(folder: Folder, seen: pa.Array) -> int:
    manifest = read_manifest(folder / "view")
    if manifest is None:
        return 0
    rows = 0
    for _, table in read_columns(Artifact(folder / "view", manifest), ["pair_id", "included", "split"]):
        trains = pc.and_(table["included"], pc.equal(table["split"], TRAIN))
        rows += pc.sum(pc.and_(trains, pc.is_in(table["pair_id"], value_set=seen))).as_py() or 0
    return rows


def _rows_of_clip(seen: pa.Array, settings: Plain) -> int:
    return int((~is_validation(seen.to_pylist(), float(settings.get("validation_fraction", 0.0)))).sum())


def _trained(target: Folder) -> Iterator[tuple[str, dict[str, str], Plain]]:
    """(where, digests of the inputs, settings) of what was trained here: a loaded CLIP has seen nothing of ours."""
    manifest: Manifest | None = read_manifest(target)
    if manifest is not None and "training" in manifest.identity["settings"]:
        yield f"revision {manifest.revision}", manifest.inputs, manifest.identity["settings"]
    for work in (name for name in target.names() if name == "work" or name.startswith("work-r")):
        checkpoints = target / work / "checkpoints"
        for name in checkpoints.names():
            try:
                marker = json.loads((checkpoints / name).read(_CHECKPOINT))
            except (FileNotFoundError, NotADirectoryError, ValueError):
                continue  # never completed: no reader takes it for a checkpoint
            yield f"step {marker['step']}", marker["trained"]["inputs"], _begun_with(target, work)


def _begun_with(target: Folder, work: str) -> Plain:
    """The settings of the revision whose scratch folder this is."""
    settings: Plain = json.loads(target.read(work.replace("work", "request", 1) + ".json"))["identity"]["settings"]
    return settings
