"""`unclip run --until images` on the same table, as a person calls it: every guard on, politeness wide, over Ray.

What a run did is read from what it leaves: receipts and their times.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from benchmarks.ingest.processes import Ran, run_command
from cluster.artifact import Artifact

ACTORS = 2


@dataclass(frozen=True)
class OurRun:
    rows: int
    stored: int
    seconds: float  # of the command
    shards_s: float  # from the first task's start to the last receipt
    first_receipt_s: float  # after the command's start
    peak_bytes: int
    reasons: dict[str, int]

    @property
    def shard_rate(self) -> float:
        return self.rows / self.shards_s

    @property
    def command_rate(self) -> float:
        return self.rows / self.seconds


def write_recipe(path: Path, table: Path, shard_rows: int, **images: Any) -> None:
    """The tiny recipe (a run must name its models) with this table instead of its scenes."""
    recipe = yaml.safe_load((resources.files("pipeline") / "recipes" / "tiny.yaml").read_text())
    recipe |= {
        "source": {"pairs": str(table), "url_column": "url", "caption_column": "caption"},
        "evaluation_sets": [],
        "images": {"shard_rows": shard_rows, "size": 256, "quality": 95, "allow_networks": ["127.0.0.0/8"], **images},
        "cluster": {"shard_actors": ACTORS},
    }
    path.write_text(yaml.safe_dump(recipe))


def run_ours(recipe: Path, out: Path, *, memory: bool = False) -> OurRun:
    shutil.rmtree(out, ignore_errors=True)
    command = [
        str(Path(sys.executable).with_name("unclip")),
        "run",
        str(recipe),
        "--out",
        str(out),
        "--until",
        "images",
    ]
    ran = run_command(command, out.with_suffix(".log"), memory=memory)
    return _read(out, ran)


def _read(out: Path, ran: Ran) -> OurRun:
    images = Artifact.open(str(out / "images"))
    reasons: dict[str, int] = {}
    stored, begun, ended = 0, [], []
    for shard in range(images.shard_count):
        stats = images.stats(shard)
        for reason, number in stats["reasons"].items():
            reasons[reason] = reasons.get(reason, 0) + number
    for path in sorted((out / "images").rglob("receipts/*.json")):
        receipt = json.loads(path.read_bytes())
        committed = path.stat().st_mtime
        ended.append(committed)
        begun.append(committed - receipt["stats"]["seconds"])
        stored += receipt["counts"].get("ok", 0)
    return OurRun(
        images.rows,
        stored,
        ran.seconds,
        max(ended) - min(begun),
        min(ended) - ran.started_wall,
        ran.peak_bytes,
        reasons,
    )
