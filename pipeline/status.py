"""`unclip status`: how far a run is, from what lies in its folder; the driver may be anywhere, or dead."""

import json
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.artifact import Artifact, read_manifest, read_requests
from cluster.check import find_faults
from cluster.lease import driver_of
from cluster.storage import Folder
from cluster.workshop import Workshop
from pipeline.config import parse_config
from pipeline.runner import stored_config, timings
from pipeline.sources import RunSources
from pipeline.stages import stages_of

Plain = dict[str, Any]


def status_of(folder: Folder) -> Plain:
    """{"run", "driver", "stages": […], "outcomes", "reasons", "broken": […]}: plain data, for people and programs."""
    config = parse_config(stored_config(folder), f"{folder.uri}/run.json")
    driver = driver_of(folder)
    took = timings(folder)
    moving = {stage["name"]: stage for stage in _progress(folder)} if driver else {}
    stages, broken = [], []
    for stage in stages_of(config, RunSources(config, folder)):
        plain, faults = _stage(folder / stage.name, stage.name, moving.get(stage.name), took.get(stage.name))
        stages.append(plain)
        broken += [f"{stage.name}: {fault}" for fault in faults]
    images = folder / "images"
    outcomes, reasons = _outcomes(images) if read_requests(images) else (Counter(), Counter())
    return {
        "run": folder.uri,
        "driver": driver,
        "stages": stages,
        "outcomes": dict(outcomes.most_common()),
        "reasons": dict(reasons.most_common(12)),
        "broken": broken,
    }


def print_status(found: Plain) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has no edge
    driver = found["driver"]
    who = f"process {driver['pid']} on {driver['host']} is at work" if driver else "no driver is at work"
    console.print(f"{found['run']}: {who}", soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title, justify in (
        ("stage", "left"),
        ("state", "left"),
        ("shards", "right"),
        ("rows", "right"),
        ("rate", "right"),
        ("time", "right"),
        ("", "left"),
    ):
        table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for stage in found["stages"]:
        table.add_row(
            stage["name"],
            stage["state"],
            f"{stage['shards']}/{stage['shards_total']}" if stage["shards_total"] else "",
            f"{stage['rows']:,}" if stage["rows"] else "",
            f"{stage['rate']:,.1f} {stage['unit']}/s" if stage["rate"] else "",
            f"{stage['seconds']:.1f} s" if stage["seconds"] else "",
            stage["note"],
        )
    console.print(table)
    if found["outcomes"]:
        console.print("rows: " + ", ".join(f"{count:,} {name}" for name, count in found["outcomes"].items()))
    for reason, count in found["reasons"].items():
        console.print(f"  {count:>8,}  {reason}", soft_wrap=True)
    for fault in found["broken"]:
        console.print(f"broken: {fault}", soft_wrap=True, style="red")


def _stage(target: Folder, name: str, moving: Plain | None, took: Plain | None) -> tuple[Plain, list[str]]:
    plain: Plain = {
        "name": name,
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
    }
    faults: list[str] = []
    manifest = read_manifest(target)
    newest = max(read_requests(target), default=0)
    if manifest is not None:
        totals = manifest.totals
        plain |= {
            "state": "published",
            "shards": totals["shards"],
            "shards_total": totals["shards"],
            "rows": totals["rows"],
            "counts": totals["counts"],
            "revision": manifest.revision,
        }
        faults = list(find_faults(Artifact(target, manifest), read_bytes=False))
        if took:
            plain |= {"seconds": took["seconds"], "rate": took["rate"], "unit": took["unit"], "note": took["note"]}
        if newest > manifest.revision:
            plain["note"] = f"revision {newest} is unfinished"
    if manifest is None and newest:
        plain |= {"state": "unfinished", "shards": len(Workshop(target.uri, newest).committed())}
    if moving and moving["state"] == "running":
        plain |= {key: moving[key] for key in ("rate", "unit", "seconds", "left_s", "note")}
        plain["state"] = "running"
        plain["note"] = f"{moving['done']:,.0f}/{moving['total']:,.0f} {moving['unit']} {moving['note']}".strip()
    return plain, faults


def _progress(folder: Folder) -> list[Plain]:
    if not folder.exists("progress.json"):
        return []
    stages: list[Plain] = json.loads(folder.read("progress.json"))["stages"]
    return stages


def _outcomes(images: Folder) -> tuple[Counter[str], Counter[str]]:
    """Rows by outcome and by reason, from the receipts there are: of a finished artifact or of one in the making."""
    revision = max(read_requests(images))
    workshop = Workshop(images.uri, revision)
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for shard in sorted(workshop.committed()):
        receipt = workshop.receipt(shard)
        assert receipt is not None
        outcomes.update(receipt.counts)
        reasons.update(receipt.stats.get("reasons", {}))
    return outcomes, reasons
