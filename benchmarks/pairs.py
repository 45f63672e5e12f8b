"""How much memory, disk and time the partition of a large table takes.

    python -m benchmarks.pairs                                       10⁷ rows, in a temporary folder
    python -m benchmarks.pairs --rows 1000000 --scratch /mnt/disk
    python -m benchmarks.pairs --page docs/benchmarks/pairs.md       also writes the dated page

The table is made here: Parquet, URLs of about 50 and captions of about 70 characters; of a hundred rows one repeats an
earlier row and three have the URL of an earlier row with a caption of their own. Then a second snapshot, without its
first hundredth and with two hundredths more, grows what was built. Each step is a process of its own and tells its own
peak, Python and pyarrow included.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

Plain = dict[str, Any]

GROUP_ROWS = 500_000
REPEATED, SHARED_URL = 0.01, 0.03
GONE, MORE = 0.01, 0.02
WORDS = (
    "a",
    "photo",
    "of",
    "the",
    "old",
    "red",
    "house",
    "by",
    "sea",
    "with",
    "two",
    "dogs",
    "in",
    "rain",
    "at",
    "bridge",
)
_SAMPLED_EVERY_S = 0.25


def write_source(path: Path, rows: int, skipped: int = 0) -> None:
    """The table without its first rows, a row group at a time."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    draws = np.random.default_rng(0)
    words = pa.array(WORDS)
    schema = pa.schema([("url", pa.string()), ("caption", pa.string())])
    with pq.ParquetWriter(path, schema, compression="snappy") as writer:
        for start in range(0, rows, GROUP_ROWS):
            own = np.arange(start, min(start + GROUP_ROWS, rows))
            earlier = (draws.random(len(own)) * own).astype(np.int64)
            kind = draws.random(len(own))
            url_of = np.where(kind < REPEATED + SHARED_URL, earlier, own)
            caption_of = np.where(kind < REPEATED, earlier, own)
            number = pa.array(url_of).cast(pa.string())
            host = pa.array(url_of * 7919 % 9973).cast(pa.string())
            url = pc.binary_join_element_wise("https://images", host, ".example.org/", number, "/photo.jpg", "")
            # Twelve words that follow from the row's number without repeating from row to row, and the number.
            mixed = [(caption_of * (2 * place + 1) * 2_654_435_761 >> 16 + place) % len(WORDS) for place in range(12)]
            parts = [words.take(pa.array(choice)) for choice in mixed]
            caption = pc.binary_join_element_wise(*parts, pa.array(caption_of).cast(pa.string()), " ")
            writer.write_table(pa.table([url, caption], schema=schema).slice(max(0, skipped - start)))


def partition(source: Path, folder: Path, shard_rows: int) -> Plain:
    """Build and publish the pairs; what was found, and seconds."""
    from cluster.artifact import Request
    from cluster.storage import Folder
    from cluster.workshop import begin
    from ingest.partition import build_pairs
    from ingest.sources import open_source

    shop = begin(Folder(folder), Request("pairs", 1, {}, {}), {})
    clock = Clock()
    totals = build_pairs(open_source(str(source)), shop, shard_rows=shard_rows, report=clock.report)
    shop.publish(totals["shards"])
    return {"totals": totals, "seconds": clock.seconds()}


def grow(source: Path, folder: Path, shard_rows: int) -> Plain:
    """Append a second snapshot to what was built; what was found, and seconds."""
    from cluster.artifact import Artifact, Request
    from cluster.storage import Folder
    from cluster.workshop import begin
    from ingest.growth import grow_pairs
    from ingest.sources import open_source

    base = Artifact.open(str(folder))
    shop = begin(Folder(folder), Request("pairs", 1, {"snapshot": 2}, {}), {})
    clock = Clock()
    growth = grow_pairs(base, open_source(str(source)), shop, shard_rows=shard_rows, report=clock.report)
    shop.publish(growth.shards, inherit=growth.inherited)
    return {"summary": growth.summary(), "seconds": clock.seconds()}


class Clock:
    """Seconds of the hashing pass, and of all."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._hashed_s = 0.0

    def report(self, done: Plain) -> None:
        if "hashed" in done:
            self._hashed_s = time.perf_counter() - self._started

    def seconds(self) -> Plain:
        return {"hash": self._hashed_s, "all": time.perf_counter() - self._started}


def measured(rows: int, shard_rows: int, scratch: Path) -> Plain:
    """Write the table and partition it, each in a process of its own."""
    scratch.mkdir(parents=True, exist_ok=True)
    source, folder = scratch / "source.parquet", scratch / "pairs"
    _child(["write", str(source), str(rows), "0"])
    result = _child(["partition", str(source), str(folder), str(shard_rows)], folder / "work")
    kept_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return result | {"rows": rows, "source_bytes": source.stat().st_size, "artifact_bytes": kept_bytes}


def measured_growth(rows: int, shard_rows: int, scratch: Path) -> Plain:
    """A second snapshot, on top of what `measured` built in the same folder."""
    source, folder = scratch / "source-2.parquet", scratch / "pairs"
    _child(["write", str(source), str(round(rows * (1 + MORE))), str(round(rows * GONE))])
    return _child(["grow", str(source), str(folder), str(shard_rows)], folder / "work-r2")


def _child(arguments: list[str], watched: Path | None = None) -> Plain:
    """What the step says, and what its process took."""
    command = [sys.executable, "-m", "benchmarks.pairs", "--step", *arguments]
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(command, stdout=output, cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"})
        peak = 0
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, _bytes_in(watched) if watched is not None else 0)
            time.sleep(_SAMPLED_EVERY_S)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"{' '.join(command)} ended with exit code {child.returncode}")
        output.seek(0)
        said: Plain = json.loads(output.read())
        return said | {
            "scratch_peak_bytes": peak,
            "cpu_s": usage.ru_utime + usage.ru_stime,
        }


def _peak_rss_bytes() -> int:
    """Of this process. `ru_maxrss` would count what its parent had in memory as it was started."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])


def _bytes_in(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(f"{place}/{name}").st_size
            except FileNotFoundError:
                continue
    return total


def lines_of(built: Plain, grown: Plain) -> list[str]:
    totals, rows = built["totals"], built["rows"]
    return [
        f"**build** of {rows:,} rows ({totals['duplicates']:,} exact duplicates) in {totals['shards']:,} shards:"
        f" {_cost(built, rows)}; source {_mb(built['source_bytes'])}, artifact {_mb(built['artifact_bytes'])}",
        f"**growth** ({grown['summary']}): {_cost(grown, rows)}",
    ]


def _cost(step: Plain, rows: int) -> str:
    seconds = step["seconds"]
    return (
        f"peak resident memory {_mb(step['peak_rss_bytes'])}; {seconds['all']:.1f} s ({rows / seconds['all']:,.0f}"
        f" rows/s), {seconds['hash']:.1f} of them hashing, CPU {step['cpu_s']:.1f} s with starting;"
        f" scratch at its peak {_mb(step['scratch_peak_bytes'])}"
    )


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def facts() -> list[str]:
    from importlib.metadata import version

    info = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
    return [
        f"date: {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}",
        f"command: `python -m benchmarks.pairs {' '.join(sys.argv[1:])}`",
        f"machine: {models[0] if models else 'unknown CPU'}, {os.cpu_count()} cores; {platform.platform()}",
        f"load average before: {os.getloadavg()[0]:.2f}",
        f"versions: Python {platform.python_version()}, pyarrow {version('pyarrow')}, numpy {version('numpy')}",
    ]


def page(lines: list[str], about: list[str]) -> str:
    listed = "\n".join(f"- {line}" for line in about)
    figures = "\n".join(f"- {line}" for line in lines)
    return f"""# Pairs of a large table

What `pairs` takes for a table of captioned URLs that is larger than memory should be. The table is synthetic: of a
hundred rows one repeats an earlier row, three have the URL of an earlier row. The growth is a second snapshot, without
the first hundredth and with two hundredths more. Each is a process of its own. Written by `benchmarks/pairs.py`; no
figure here is typed by hand.

{listed}

{figures}
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pairs", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--shard-rows", type=int, default=10_000)
    parser.add_argument("--scratch", type=Path, help="folder for table and artifact  [a temporary one]")
    parser.add_argument("--page", type=Path, help="write the dated Markdown page there")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        step, *rest = arguments.step
        if step == "write":
            write_source(Path(rest[0]), int(rest[1]), int(rest[2]))
            print("{}")
        else:
            said = {"partition": partition, "grow": grow}[step](Path(rest[0]), Path(rest[1]), int(rest[2]))
            print(json.dumps(said | {"peak_rss_bytes": _peak_rss_bytes()}))
        return
    about = facts()
    with tempfile.TemporaryDirectory(prefix="unclip-pairs-", dir=arguments.scratch) as scratch:
        sizes = (arguments.rows, arguments.shard_rows, Path(scratch))
        lines = lines_of(measured(*sizes), measured_growth(*sizes))
    print("\n".join([*about, *lines]))
    if arguments.page:
        arguments.page.write_text(page(lines, about))


if __name__ == "__main__":
    main()
