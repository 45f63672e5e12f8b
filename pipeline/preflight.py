"""Before a run starts: is there room for what is still missing?

Compared are free bytes and free inodes of the run's disk with the estimates of the stages whose size goes with their
rows; models and their checkpoints are told by `unclip plan`. An estimate may be wrong by a factor of two, so that a run
is refused where not even half of it fits, and warned where not all of it does. Files are counted exactly enough.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.artifact import Artifact, read_manifest, read_requests
from cluster.errors import UserError
from cluster.storage import Folder
from cluster.workshop import Workshop
from pipeline.config import RunConfig
from pipeline.estimate import StageEstimate, estimate_data, source_rows
from pipeline.sources import RunSources
from pipeline.words import bytes_in_words

REFUSED_BELOW = 0.5


@dataclass(frozen=True)
class Missing:
    """What a stage has yet to write."""

    stage: str
    bytes: int
    files: int


def preflight(
    config: RunConfig, folder: Folder, states: Mapping[str, str], sources: RunSources, retry: Collection[str] = ()
) -> list[str]:
    """What is worth saying before the run starts. Raises `UserError` where it cannot fit.

    `states` are the runner's answers by stage; a stage that is current is not counted, one that is amended or stale
    with the rows only by which its source has grown: the shards that stand are taken over, but for those with rows that
    ended in a status of `retry`, which are written anew.
    """
    rows, _ = source_rows(config, sources)
    missing = [
        found
        for stage, estimate in estimate_data(config, rows).items()
        if states.get(stage, "current") != "current"
        and (found := _missing(folder, stage, states[stage], estimate, retry))
    ]
    size, files = sum(stage.bytes for stage in missing), sum(stage.files for stage in missing)
    if not missing:
        return []
    needs = f"about {bytes_in_words(size)} in {files:,} files"
    if not folder.local:
        return [f"{folder.uri}: {needs} will be written; how much room there is, an object store does not say."]
    room = _room(folder)
    largest = max(missing, key=lambda stage: stage.bytes)
    parts = f"{folder.uri} still needs {needs} (most of it {largest.stage}: {bytes_in_words(largest.bytes)})"
    remedy = (
        "Make room, choose another --out, store smaller pictures (images.size, images.quality), or take more rows a "
        "shard (images.shard_rows: fewer files)."
    )
    if room.bytes < REFUSED_BELOW * size:
        raise UserError(f"{parts}, and its disk has {bytes_in_words(room.bytes)} free. {remedy}")
    if room.files is not None and room.files < files:
        raise UserError(f"{parts}, and its disk has room for {room.files:,} files more (inodes). {remedy}")
    if room.bytes < size:
        return [f"{parts}, and its disk has {bytes_in_words(room.bytes)} free: it may not fit. {remedy}"]
    return []


@dataclass(frozen=True)
class Room:
    """Free bytes and files of a disk; None where it does not count files."""

    bytes: int
    files: int | None


def _room(folder: Folder) -> Room:
    path = Path(folder.uri)
    while not path.exists():
        path = path.parent
    disk = os.statvfs(path)
    return Room(disk.f_bavail * disk.f_frsize, disk.f_favail if disk.f_files else None)


def _missing(folder: Folder, stage: str, state: str, estimate: StageEstimate, retry: Collection[str]) -> Missing | None:
    """The part of a stage that is not there yet: not its rows that stand, nor the shards of an unfinished revision."""
    assert estimate.rows is not None and estimate.bytes is not None, "the size of data stages goes with their rows"
    assert estimate.files is not None and estimate.shards is not None
    target = folder / stage
    manifest, newest = read_manifest(target), max(read_requests(target), default=0)
    share, again, files = 1.0, 0, 0
    if manifest is not None and state in ("stale", "amend"):
        if retry and stage.endswith("images"):
            touched = [entry for entry in Artifact(target, manifest).shards if entry.counts.keys() & retry]
            again = sum(file.bytes for entry in touched for file in entry.files)
            files = sum(len(entry.files) + 1 for entry in touched)
        share = max(0.0, 1 - manifest.totals["rows"] / estimate.rows) if estimate.rows else 0.0
    elif newest > (manifest.revision if manifest is not None else 0):
        share = 1 - min(1.0, len(Workshop(target.uri, newest).committed()) / max(1, estimate.shards))
    size = round(share * estimate.bytes) + again
    return Missing(stage, size, round(share * estimate.files) + files) if size else None
