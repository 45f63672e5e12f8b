"""img2dataset on the same table: its own command, with its own clock of its shards."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ingest.processes import run_command
from benchmarks.ingest.spread import Lap

PROCESSES = 2


class PeerMissing(Exception):
    """img2dataset cannot be started."""


@dataclass(frozen=True)
class PeerRun:
    rows: int
    stored: int
    seconds: float  # of the command
    shards_s: float  # from its first shard's start to its last one's end
    peak_bytes: int

    @property
    def shard_rate(self) -> float:
        return self.rows / self.shards_s

    @property
    def command_rate(self) -> float:
        return self.rows / self.seconds


def peer_version(python: str) -> str:
    """Its version and those of what it decodes with. Raises `PeerMissing`."""
    code = (
        "from importlib.metadata import version as v; print(v('img2dataset'), "
        "*(f'{n} {v(n)}' for n in ('opencv-python-headless', 'albumentations', 'numpy')), sep=', ')"
    )
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    command = Path(python).with_name("img2dataset")
    if found.returncode or not command.exists():
        raise PeerMissing(
            f"img2dataset is not installed for {python}. Make it an environment of its own "
            "(python -m venv peer, peer/bin/pip install img2dataset==1.47.0), named with --peer-python peer/bin/python"
        )
    return found.stdout.strip()


def run_peer(
    python: str, table: Path, out: Path, rows: int, shard_rows: int, *, threads: int, memory: bool = False
) -> PeerRun:
    """`threads` in each of its processes."""
    shutil.rmtree(out, ignore_errors=True)
    settings = {
        "url_list": table,
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "output_format": "webdataset",
        "output_folder": out,
        "processes_count": PROCESSES,
        "thread_count": threads,
        "number_sample_per_shard": shard_rows,
        "image_size": 256,
        "resize_mode": "center_crop",
        "encode_quality": 95,
        "compute_hash": "sha256",
        "distributor": "multiprocessing",
    }
    command = [str(Path(python).with_name("img2dataset")), *(f"--{name}={value}" for name, value in settings.items())]
    # Where the machine has no way out, albumentations would wait for its update check, and urllib obeys proxies.
    quiet = {name: "" for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")}
    ran = run_command(command, out.with_suffix(".log"), memory=memory, NO_ALBUMENTATIONS_UPDATE="1", **quiet)
    stats = [json.loads(path.read_bytes()) for path in out.glob("*_stats.json")]
    done = sum(each["count"] for each in stats)
    if done != rows:
        raise RuntimeError(f"img2dataset counted {done} of {rows} rows; what it said is in {out.with_suffix('.log')}")
    shards_s = max(each["end_time"] for each in stats) - min(each["start_time"] for each in stats)
    return PeerRun(rows, sum(each["successes"] for each in stats), ran.seconds, shards_s, ran.peak_bytes)


def peer_laps(python: str, pictures: Path, repeats: int) -> list[Lap]:
    """Its resizer alone, in as many processes."""
    said = _resizer(python, "laps", pictures, PROCESSES, repeats)
    return [Lap(**lap) for lap in json.loads(said)]


def peer_pictures(python: str, pictures: Path, count: int, out: Path) -> None:
    """The first `count` pictures as it stores them."""
    _resizer(python, "encode", pictures, count, out)


def _resizer(python: str, *arguments: object) -> str:
    command = [python, "-m", "benchmarks.ingest.peer_resizer", *map(str, arguments)]
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
