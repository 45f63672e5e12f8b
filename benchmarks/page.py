"""The table of stages and floors, for a terminal and as a dated Markdown page. Every figure comes from the run."""

import os
import platform
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.machine import cpu_model
from cluster.environment import environment

Plain = dict[str, Any]
HEADER = ("stage", "in the run, s", "start-up, s", "floor, s", "min … max", "run / floor", "less start-up", "floor")
PARTS_HEADER = ("stage", "in the run", "start-up", "open, build, publish", "waiting for data", "steps", "checkpoints")


@dataclass(frozen=True)
class MeasuredFloor:
    name: str
    what: str
    processes: int
    repeats_s: list[float]

    @property
    def median_s(self) -> float:
        return statistics.median(self.repeats_s)


@dataclass(frozen=True)
class MeasuredStage:
    """`startup_s`: the stage's seconds outside its workers; None where receipts do not tell, or it has no workers."""

    name: str
    seconds: float
    startup_s: float | None
    parts: Plain | None  # of training: seconds inside the worker, and on data, step, checkpoint
    floors: list[MeasuredFloor] = field(default_factory=list)


def table_rows(stages: list[MeasuredStage], *, brief: bool = False) -> list[tuple[str, ...]]:
    """A row a floor; a stage's own seconds stand in its first row."""
    rows: list[tuple[str, ...]] = []
    for stage in stages:
        own = (stage.name, _s(stage.seconds), _s(stage.startup_s))
        if not stage.floors:
            rows.append((*own, "—", "—", "—", "—", "none"))
        for floor in stage.floors:
            spread = f"{_s(min(floor.repeats_s))} … {_s(max(floor.repeats_s))}"
            ratios = (_ratio(stage.seconds, floor.median_s), _ratio(_inside_s(stage), floor.median_s))
            what = floor.name if brief else f"{floor.what} ({_processes(floor.processes)})"
            rows.append((*own, _s(floor.median_s), spread, *ratios, what))
            own = ("", "", "")
    floored = [stage for stage in stages if stage.floors]
    run_s, inside_s = sum(stage.seconds for stage in floored), sum(_inside_s(stage) for stage in floored)
    floor_s = sum(stage.floors[0].median_s for stage in floored)
    what = "first ones" if brief else "all stages that have a floor, the first floor of each"
    ratios = (_ratio(run_s, floor_s), _ratio(inside_s, floor_s))
    rows.append(("**sum**", _s(run_s), _s(run_s - inside_s), _s(floor_s), "", *ratios, what))
    return rows


def part_rows(stages: list[MeasuredStage]) -> list[tuple[str, ...]]:
    """Where the seconds of training went, on rank 0."""
    rows: list[tuple[str, ...]] = []
    for stage in stages:
        if stage.parts:
            parts = stage.parts
            around = parts["seconds"] - parts["data"] - parts["step"] - parts["checkpoint"]
            shares = (stage.startup_s, around, parts["data"], parts["step"], parts["checkpoint"])
            rows.append((stage.name, _s(stage.seconds), *(_s(share) for share in shares)))
    return rows


def facts_of(recipe: str, repeats: int, run_time: float, command_s: float | None, load: float) -> Plain:
    """What a reader must know to compare: when, where, with what."""
    took = {} if command_s is None else {"the whole `unclip run`": f"{command_s:.1f} s"}
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "run finished": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run_time)),
        **took,
        "recipe": recipe,
        "command": f"`python -m benchmarks.stages {shlex.join(sys.argv[1:])}`".replace(" `", "`"),
        "machine": f"{cpu_model()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.1f} GiB",
        "system": platform.platform(),
        "load average before": f"{load:.2f}",
        "repeats of each floor": str(repeats),
        "versions": ", ".join(f"{name} {version}" for name, version in environment().items()),
    }


def print_tables(stages: list[MeasuredStage]) -> None:
    console = Console()
    for header, rows in ((HEADER, table_rows(stages, brief=True)), (PARTS_HEADER, part_rows(stages))):
        table = Table(box=None, pad_edge=False, header_style="dim")
        for index, title in enumerate(header):
            number = index > 0 and title != HEADER[-1]
            table.add_column(title, justify="right" if number else "left", overflow="fold")
        for row in rows:
            table.add_row(*(cell.replace("**", "") for cell in row))
        console.print(table)
        console.print()


def markdown(stages: list[MeasuredStage], facts: Plain) -> str:
    facts_list = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return f"""# Stages against their floors, {facts["date"][:10]}

What each stage of a run costs beside its floor: the same result with nothing of ours around it (a model's step or
forward alone, a copy of the bytes). A floor is measured after the run, from the run's own artifacts, in as many
processes at once as the stage used, one torch thread each; the median of the repeats, each as long as its slowest
process. Seconds in the run are those of one run. Written by `benchmarks/stages.py`; no figure here is typed by hand.

{facts_list}

{_markdown_table(HEADER, table_rows(stages))}

*Start-up* is what a stage took beyond the seconds that its workers tell in their receipts: starting Ray, processes
and imports (the first stage of a pool or gang pays for those after it), hand-over, and waiting for the last shard.
`—` stands where a stage works in the driver or its receipts tell no seconds; *less start-up* is then the same ratio.
The report has no floor: there is no smaller form of a page.

What the floors leave out, beside loader, DeepSpeed, exchange of gradients and checkpoints: the average of the weights
and gradient clipping in training; the frozen text tower's states, which training reads from a prepared batch; CLIP's
negatives from the other processes; the fetching of pictures, whose stored bytes have their final size already; between
the networks of the samples, noise, schedules' arithmetic, PNGs, grid and scores.

## Training, by what the seconds went to

Seconds of rank 0, from the receipts.

{_markdown_table(PARTS_HEADER, part_rows(stages))}
"""


def _markdown_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    rule = "|".join(["---"] + ["---" if title == HEADER[-1] else "---:" for title in header[1:]])
    lines = [" | ".join(header), rule, *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" if line != rule else f"|{line}|" for line in lines)


def _s(seconds: float | None) -> str:
    """Small numbers keep their digits: some floors are fractions of a millisecond."""
    if seconds is None:
        return "—"
    digits = 1 if seconds >= 10 else 2 if seconds >= 1 else 3 if seconds >= 0.01 else 6
    return f"{seconds:,.{digits}f}"


def _ratio(seconds: float, floor_s: float) -> str:
    return f"{seconds / floor_s:,.1f}"


def _inside_s(stage: MeasuredStage) -> float:
    return stage.seconds - (stage.startup_s or 0.0)


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
