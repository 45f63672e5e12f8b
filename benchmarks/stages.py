"""Each stage of a recipe against its floor, so that the overhead of the house is known.

    python -m benchmarks.stages                                          the demo, run anew, then its floors
    python -m benchmarks.stages --run runs/demo                          a run that has finished
    python -m benchmarks.stages --page docs/benchmarks/stages.md         also writes the dated page

Seconds of stages come from the run (`timings.jsonl`, receipts), floors from benchmarks/floors.py in the same
invocation. Run it on an idle machine: what else works here is counted as ours.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Read by numpy and torch as they are imported, here and in the processes to come: the stages have one thread too.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import torch

from benchmarks.floors import FAMILY_OF_STAGE, floors_of, kind_of, processes_of
from benchmarks.page import MeasuredFloor, MeasuredStage, facts_of, markdown, print_tables
from benchmarks.processes import Processes
from cluster.artifact import Artifact
from cluster.errors import UnclipError, UserError, WorkFailed
from cluster.storage import Folder
from pipeline.config import RunConfig, load_recipe, parse_config, recipe_names
from pipeline.runner import stored_config, timings


def measure(run: str, config: RunConfig, repeats: int) -> list[MeasuredStage]:
    """Every stage that the run has a timing of, in the order in which they ran."""
    with Processes(max(config.cluster.shard_actors, config.cluster.gang_size)) as processes:
        return [
            _measured(run, name, line["seconds"], config, processes, repeats)
            for name, line in timings(Folder(run)).items()
        ]


def run_recipe(recipe: str, out: Path) -> float:
    """`unclip run` as a person calls it, with their environment. Returns its wall seconds."""
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in threads}
    command = [str(Path(sys.executable).with_name("unclip")), "run", recipe, "--out", str(out)]
    started = time.perf_counter()
    code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        raise WorkFailed(f"`unclip run {recipe}` ended with exit code {code}; what it said stands above")
    return time.perf_counter() - started


def recipe_of(config: RunConfig) -> str:
    """The recipe of ours that a run was driven with."""
    return next((name for name in recipe_names() if load_recipe(name, []) == config), "none of ours")


def _measured(
    run: str, name: str, seconds: float, config: RunConfig, processes: Processes, repeats: int
) -> MeasuredStage:
    artifact = Artifact.open(f"{run}/{name}")
    used = processes_of(name, config, artifact)
    floors = []
    for floor in floors_of(name, config):
        print(f"{name}: {floor.what} …", file=sys.stderr, flush=True)
        laps = processes.seconds_of(floor.prepare, config, run, name, processes=used, repeats=repeats)
        floors.append(MeasuredFloor(floor.name, floor.what, used, laps))
    stats = [artifact.stats(shard) for shard in range(artifact.shard_count)]
    return MeasuredStage(name, seconds, _startup_s(name, seconds, stats, used), _parts(name, stats), floors)


def _startup_s(name: str, seconds: float, stats: list[dict[str, Any]], processes: int) -> float | None:
    kind = kind_of(name)
    if kind in ("pairs", "report") or not stats or any("seconds" not in each for each in stats):
        return None
    at_once = processes if kind in ("images", "embeddings") else 1  # a gang has one receipt, of all its processes
    return max(0.0, seconds - sum(float(each["seconds"]) for each in stats) / at_once)


def _parts(name: str, stats: list[dict[str, Any]]) -> dict[str, float] | None:
    if name not in FAMILY_OF_STAGE or "timings" not in stats[0]:
        return None
    return {"seconds": stats[0]["seconds"], **stats[0]["timings"]}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stages", description="Each stage against its floor.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--recipe", default="demo", help="recipe to run in a fresh temporary folder  [demo]")
    which.add_argument("--run", help="a finished run on this machine, instead of a new one")
    parser.add_argument("--repeats", type=int, default=3, help="of each floor; the median counts  [3]")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--page", type=Path, help="write the dated Markdown page there")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error(f"--repeats is {arguments.repeats}; 1 is the least")
    return arguments


def _benchmark(
    arguments: argparse.Namespace, run: str, load: float, recipe: str | None, command_s: float | None
) -> None:
    folder = Folder(run)
    config = parse_config(stored_config(folder), f"{run}/run.json")
    if torch.cuda.is_available():
        raise UserError("the floors are a CPU's, and this machine's stages use its GPU; set CUDA_VISIBLE_DEVICES=")
    if "report" not in timings(folder):
        raise UserError(f"{run} is not finished; `unclip run` with the same --out goes on where it stopped")
    stages = measure(run, config, arguments.repeats)
    run_time = max(line["time"] for line in timings(folder).values())
    facts = facts_of(recipe or recipe_of(config), arguments.repeats, run_time, command_s, load)
    print_tables(stages)
    if arguments.json:
        arguments.json.write_text(json.dumps({"facts": facts, "stages": [asdict(stage) for stage in stages]}, indent=1))
    if arguments.page:
        arguments.page.parent.mkdir(parents=True, exist_ok=True)
        arguments.page.write_text(markdown(stages, facts), encoding="utf-8")


def main() -> None:
    arguments = _arguments()
    load = os.getloadavg()[0]
    try:
        if arguments.run:
            _benchmark(arguments, str(Path(arguments.run).resolve()), load, None, None)
        else:
            with tempfile.TemporaryDirectory(prefix="unclip-stages-") as folder:
                out = Path(folder) / "run"
                _benchmark(arguments, str(out), load, arguments.recipe, run_recipe(arguments.recipe, out))
    except UnclipError as error:
        print(f"benchmarks.stages: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
