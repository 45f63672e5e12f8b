"""`unclip takedown`: rows leave a run, and everything that rests on them follows on the next `unclip run`.

    match        the list against every pairs table (or, for hashes of pictures, every ledger), shard by shard
    tombstones   `removed.parquet`, replaced at once: from here on the removal cannot be lost
    record       `takedowns/<n>.json`: counts, and which models saw a removed row. No url, caption or hash is in it
    amend        a revision of pairs, then one of images, in which only the shards with such rows are new
    finish       the record says so

What is amended depends on the tombstones alone, so whoever comes after a kill (this command again, or `unclip run`,
which calls `finish_takedown`) ends in the same state. Images name the new pairs as their input: they are current, and
only what lies below them is stale.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from cluster.artifact import Artifact, read_manifest, read_requests
from cluster.errors import UserError
from cluster.lease import Lease
from cluster.storage import Folder
from ingest.removal import TOMBSTONES_FILE, Tombstones, add_tombstones, read_tombstones
from ingest.removal_lists import ListKind, PairList, RemovalList, read_removal_list
from pipeline.amendment import amend_images, amend_pairs, read_begun
from pipeline.exposure import models_that_saw, ok_pairs
from pipeline.gc import delete_unnamed
from pipeline.runner import stored_config

Plain = dict[str, Any]
Section = Literal["pairs", "images"]
RECORDS = "takedowns"


def take_down(folder: Folder, kind: ListKind, path: str | Path, *, purge: bool = False) -> Plain:
    """Remove what the list names. → the takedown's record, and what was `matched` and `purged`. Raises `UserError`."""
    wanted = read_removal_list(kind, path)
    stored_config(folder)
    if read_manifest(folder / "pairs") is None:
        raise UserError(
            f"{folder.uri} has no pairs yet: which rows a list means is known once they are partitioned. "
            f"Run with --until pairs, then repeat this command."
        )
    with Lease(folder) as lease:
        finished = finish_takedown(folder, lease)
        found = _matched(folder, wanted)
        earlier = set(read_tombstones(folder).pair_ids.to_pylist())
        new = found.pair_ids - earlier
        result: Plain = {"run": folder.uri, "by": kind, "listed": wanted.listed, "matched": found.counts}
        result |= {"pairs": len(found.pair_ids), "earlier": len(found.pair_ids & earlier), "finished_first": finished}
        if new:
            number = _last_record(folder) + 1
            add_tombstones(folder, new, number)
            result |= _apply(folder, lease, number, {"by": kind, "listed": wanted.listed, "pairs": len(new)})
        if purge:
            names = [name for section in ("pairs", "images") for name in artifacts(folder, section)]
            result["purged"] = delete_unnamed(folder, names)
    return result


def pending_takedown(folder: Folder) -> int | None:
    """The number of a takedown that was begun and did not live to its end, or None."""
    if not folder.exists(TOMBSTONES_FILE):
        return None
    number = read_tombstones(folder).takedown
    record = _record(folder, number)
    return number if number and (record is None or record["state"] != "finished") else None


def finish_takedown(folder: Folder, lease: Lease) -> int | None:
    """Bring a takedown that was killed to its end. → its number, or None where there was none."""
    number = pending_takedown(folder)
    if number is not None:
        _apply(folder, lease, number, {"by": None, "listed": None, "pairs": None})
    return number


def artifacts(folder: Folder, section: Section) -> list[str]:
    """The artifacts of a kind that were begun: of the training pairs and of every evaluation set that lies there."""
    names = [section, *(f"evaluation/{name}/{section}" for name in (folder / "evaluation").names())]
    return [name for name in names if read_requests(folder / name)]


@dataclass(frozen=True)
class _Matched:
    pair_ids: set[bytes]
    counts: dict[str, dict[str, int]]  # artifact → way of matching → rows


def _matched(folder: Folder, wanted: RemovalList) -> _Matched:
    """The pairs that a list means, streaming. A pair id that is listed counts although no row has it (yet)."""
    pair_ids: set[bytes] = set(wanted.pair_ids.to_pylist()) if isinstance(wanted, PairList) else set()
    counts: dict[str, dict[str, int]] = {}
    for name in artifacts(folder, wanted.of):
        of_artifact: dict[str, int] = {}
        for table in read_begun(folder / name, ["pair_id", *wanted.columns]):
            for how, mask in wanted.matches(table).items():
                of_artifact[how] = of_artifact.get(how, 0) + int(mask.sum())
                if mask.any():
                    pair_ids.update(table["pair_id"].filter(pa.array(mask)).to_pylist())
        counts[name] = of_artifact
    return _Matched(pair_ids, counts)


def _apply(folder: Folder, lease: Lease, number: int, asked: Plain) -> Plain:
    """Everything after the tombstones. Safe to kill, and to repeat."""
    tombstones = read_tombstones(folder)
    record = _record(folder, number) or _begun(folder, tombstones, asked | {"takedown": number})
    published = [name for name in artifacts(folder, "pairs") if read_manifest(folder / name) is not None]
    for name in published:
        _note(folder, record, name, amend_pairs(folder / name, tombstones, fence=lease.check))
    for name in published:
        images = f"{name.removesuffix('pairs')}images"
        pairs = Artifact.open(folder / name)
        _note(folder, record, images, amend_images(folder / images, pairs, tombstones, fence=lease.check))
    record |= {"state": "finished", "finished": time.time()}
    _write_record(folder, record)
    return record


def _begun(folder: Folder, tombstones: Tombstones, asked: Plain) -> Plain:
    """The record before anything is amended: what the models saw can be told now, and not afterwards."""
    seen = ok_pairs(folder, tombstones)
    record = asked | {
        "state": "begun",
        "begun": time.time(),
        "was_ok": len(seen),
        "artifacts": {},
        "models": models_that_saw(folder, seen),
    }
    _write_record(folder, record)
    return record


def _note(folder: Folder, record: Plain, name: str, amended: dict[str, int] | None) -> None:
    if amended is not None:
        record["artifacts"][name] = amended
        _write_record(folder, record)


def _record(folder: Folder, number: int) -> Plain | None:
    name = f"{RECORDS}/{number}.json"
    if not folder.exists(name):
        return None
    record: Plain = json.loads(folder.read(name))
    return record


def _write_record(folder: Folder, record: Plain) -> None:
    folder.write(f"{RECORDS}/{record['takedown']}.json", json.dumps(record, indent=1).encode())


def _last_record(folder: Folder) -> int:
    numbers = [int(stem) for name in (folder / RECORDS).names() if (stem := name.removesuffix(".json")).isdigit()]
    return max([read_tombstones(folder).takedown, *numbers])
