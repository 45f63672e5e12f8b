"""`unclip status`: how far a run is, from what lies in its folder; the driver may be anywhere, or dead.

A run may have 10⁶ shards, and status is asked every few minutes: rows by outcome come from the manifest; reasons and
failing hosts, which only receipts have, come from at most `RECEIPTS_READ` of them, evenly chosen, and files are looked
for in the same ones. `unclip verify` looks at all.
"""

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster.artifact import Artifact, Receipt, read_manifest, read_requests
from cluster.check import find_faults
from cluster.errors import WorkFailed
from cluster.lease import driver_of
from cluster.storage import Folder
from cluster.workshop import READERS, Workshop
from ingest.removal import read_tombstones
from pipeline.config import parse_config
from pipeline.held import read_held
from pipeline.runner import stored_config, timings
from pipeline.sources import RunSources
from pipeline.stage import Stage
from pipeline.stages import stages_of
from pipeline.takedown import pending_takedown

Plain = dict[str, Any]
RECEIPTS_READ = 1000
REASONS_TOLD, HOSTS_TOLD = 12, 10
EMPTY: Plain = {
    "state": "waiting",
    "shards": 0,
    "shards_total": 0,
    "rows": 0,
    "counts": {},
    "rate": 0.0,
    "unit": "",
    "seconds": 0.0,
    "left_s": None,
    "note": "",
    "warning": "",
    "unfinished": None,
}


def status_of(folder: Folder) -> Plain:
    """Plain data, for people and programs:

    run, driver            where, and who is at work on it (null: nobody)
    stages                 state, shards, rows, counts, rate, left_s, warning; `unfinished`: a revision that was begun
    outcomes               rows of `images` by outcome
    reasons, failing_hosts the most frequent; counted in `read` of the `of` shards that there are
    held                   shards that are held back: artifact, shard, why
    removed, takedown      tombstones, and the number of a takedown that was not brought to its end
    broken                 a sentence a fault
    """
    config = parse_config(stored_config(folder), f"{folder.uri}/run.json")
    driver = driver_of(folder)
    took = timings(folder)
    moving = {stage["name"]: stage for stage in _progress(folder)} if driver else {}
    stages, broken, held = [], [], []
    for stage in stages_of(config, RunSources(config, folder)):
        plain, faults = _stage(folder, stage, moving.get(stage.name), took.get(stage.name))
        stages.append(plain)
        broken += [f"{stage.name}: {fault}" for fault in faults]
        for shard, said in read_held(folder / stage.name).get("shards", {}).items():
            held.append({"artifact": stage.name, "shard": int(shard), "why": said["why"]})
    return {
        "run": folder.uri,
        "driver": driver,
        "stages": stages,
        **_images(folder / "images"),
        "held": held,
        "removed": len(read_tombstones(folder).pair_ids),
        "takedown": pending_takedown(folder),
        "broken": broken,
    }


def _stage(folder: Folder, stage: Stage, moving: Plain | None, took: Plain | None) -> tuple[Plain, list[str]]:
    target = folder / stage.name
    plain: Plain = {"name": stage.name} | EMPTY
    faults: list[str] = []
    manifest, requests = read_manifest(target), read_requests(target)
    newest = max(requests, default=0)
    if manifest is not None:
        totals = manifest.totals
        plain |= {"state": "published", "revision": manifest.revision}
        plain |= {"shards": totals["shards"], "shards_total": totals["shards"]}
        plain |= {"rows": totals["rows"], "counts": totals["counts"]}
        chosen = _chosen(range(totals["shards"]))
        faults = list(find_faults(Artifact(target, manifest), read_bytes=False, only=chosen))
        if took:
            plain |= {"seconds": took["seconds"], "rate": took["rate"], "unit": took["unit"], "note": took["note"]}
    if newest > (manifest.revision if manifest is not None else 0):
        done = len(Workshop(target.uri, newest).committed())
        amends = requests[newest].get("amends")
        plain["unfinished"] = {"revision": newest, "shards": done, "amends": amends}
        if manifest is None:
            plain |= {"state": "unfinished", "shards": done, "shards_total": _expected_shards(folder, stage)}
        plain["note"] = f"revision {newest}{_amends_in_words(amends)} is unfinished, {done:,} shards of it are done"
    if moving and moving["state"] == "running":
        plain |= {key: moving[key] for key in ("rate", "unit", "seconds", "left_s", "note")}
        plain |= {"state": "running", "warning": moving.get("warning", "")}
        plain["note"] = f"{moving['done']:,.0f}/{moving['total']:,.0f} {moving['unit']} {moving['note']}".strip()
    return plain, faults


def _expected_shards(folder: Folder, stage: Stage) -> int:
    """Of a stage that has a shard for each of its first input; 0 where there is no telling."""
    if stage.section not in ("images", "embeddings", "view"):
        return 0
    manifest = read_manifest(folder / stage.inputs[0])
    return manifest.totals["shards"] if manifest is not None else 0


def _amends_in_words(amends: Plain | None) -> str:
    """` (retry fetch_failed)`: what a revision changes."""
    said = [f"{key} {_word(value)}" for key, value in (amends or {}).items() if key != "revision"]
    return f" ({', '.join(said)})" if said else ""


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _progress(folder: Folder) -> list[Plain]:
    if not folder.exists("progress.json"):
        return []
    stages: list[Plain] = json.loads(folder.read("progress.json"))["stages"]
    return stages


def _images(images: Folder) -> Plain:
    """Rows by outcome, reasons and failing hosts of the training images, published or in the making."""
    receipts, shards, outcomes = _receipts(images)
    reasons: Counter[str] = Counter()
    hosts: Counter[str] = Counter()
    for receipt in receipts:
        reasons.update(receipt.stats.get("reasons", {}))
        hosts.update(receipt.stats.get("failing_hosts", {}))
    if outcomes is None:
        outcomes = Counter()
        for receipt in receipts:
            outcomes.update(receipt.counts)
    return {
        "outcomes": {name: count for name, count in outcomes.most_common() if count},
        "reasons": dict(reasons.most_common(REASONS_TOLD)),
        "failing_hosts": dict(hosts.most_common(HOSTS_TOLD)),
        "read": len(receipts),
        "of": shards,
    }


def _receipts(images: Folder) -> tuple[list[Receipt], int, Counter[str] | None]:
    """Receipts of some shards, how many shards there are, and the outcomes where the manifest has them."""
    manifest, newest = read_manifest(images), max(read_requests(images), default=0)
    if manifest is None and not newest:
        return [], 0, None
    if manifest is not None:
        artifact, outcomes = Artifact(images, manifest), Counter(manifest.totals["counts"])
        chosen, shards = _chosen(range(artifact.shard_count)), artifact.shard_count
        return _read(lambda shard: _receipt_of(artifact, shard), chosen), shards, outcomes
    workshop = Workshop(images.uri, newest)
    committed = sorted(workshop.committed())
    return _read(workshop.receipt, _chosen(committed)), len(committed), None


def _receipt_of(artifact: Artifact, shard: int) -> Receipt | None:
    try:
        return artifact.receipt(shard)
    except WorkFailed:
        return None  # it is missing, and stands among the faults


def _read(read: Any, shards: Sequence[int]) -> list[Receipt]:
    with ThreadPoolExecutor(READERS, thread_name_prefix="receipts") as readers:
        return [receipt for receipt in readers.map(read, shards) if receipt is not None]


def _chosen(shards: Sequence[int]) -> Sequence[int]:
    """All shards, or as many as are looked at, evenly chosen."""
    step = -(-len(shards) // RECEIPTS_READ) if shards else 1
    return shards[::step]
