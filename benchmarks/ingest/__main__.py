"""Ingest beside img2dataset and beside what the machine allows, in one run on one server.

    python -m benchmarks.ingest                                       about five minutes on two cores
    python -m benchmarks.ingest --page docs/benchmarks/ingest.md      also writes the dated page
    python -m benchmarks.ingest --quick                               a check that everything works; no figures to quote

Run it on an idle machine: what else works here is counted as ours, or theirs.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

# Read by numpy as it is imported, here and in the processes to come.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

from benchmarks.ingest.measure import Bench, Scale
from benchmarks.ingest.page import facts_of, markdown, print_tables
from benchmarks.ingest.peer import PeerMissing, peer_version

FULL = Scale(rows=3000, shard_rows=500, repeats=5, floor_repeats=5, sample=120)
QUICK = Scale(rows=600, shard_rows=100, repeats=1, floor_repeats=2, sample=20)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ingest", description="Ingest beside img2dataset.")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has img2dataset  [this one]")
    parser.add_argument("--no-peer", action="store_true", help="leave img2dataset out")
    parser.add_argument("--quick", action="store_true", help="fewer rows and repeats: a check, not a measurement")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--page", type=Path, help="write the dated Markdown page there")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    load, started = os.getloadavg()[0], time.monotonic()
    try:
        peer = None if arguments.no_peer else peer_version(arguments.peer_python)
    except PeerMissing as error:
        sys.exit(f"benchmarks.ingest: {error}; or leave it out: --no-peer")
    scale = QUICK if arguments.quick else FULL
    with tempfile.TemporaryDirectory(prefix="unclip-ingest-") as folder:
        found = Bench(Path(folder), scale, None if peer is None else arguments.peer_python).run()
    facts = facts_of(scale, peer, load, time.monotonic() - started)
    print_tables(found)
    if arguments.json:
        figures = {name: series.values for name, series in found.series.items()}
        targets = [asdict(target) | {"met": target.met} for target in found.targets()]
        arguments.json.write_text(json.dumps({"facts": facts, "figures": figures, "targets": targets}, indent=1))
    if arguments.page:
        arguments.page.parent.mkdir(parents=True, exist_ok=True)
        arguments.page.write_text(markdown(found, facts), encoding="utf-8")


if __name__ == "__main__":
    main()
