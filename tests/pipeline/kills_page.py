"""The table of kills, for a terminal and as a dated Markdown page."""

import os
import platform
import shlex
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import psutil

from benchmarks.machine import cpu_model
from cluster.environment import environment

STATES = ("before the stage", "no shard done", "some shards done", "all shards done, not published")


@dataclass(frozen=True)
class Kill:
    victim: str
    state: str
    run: int


@dataclass
class Record:
    """What happened. `differing`: files of finished runs that are not as the undisturbed run's; `gave_up`: runs that
    ended by themselves, with a word of why, after a kill that they should have survived."""

    seed: int
    shards: int
    kills: list[Kill] = field(default_factory=list)
    runs: int = 0
    calls: int = 0
    files: int = 0
    bytes: int = 0
    rows: int = 0
    gave_up: int = 0
    differing: list[str] = field(default_factory=list)
    rows_differing: list[str] = field(default_factory=list)
    seconds: float = 0.0


def table(record: Record) -> str:
    """Victims down, states across."""
    counts = Counter((kill.victim, kill.state) for kill in record.kills)
    victims = list(dict.fromkeys(kill.victim for kill in record.kills))
    lines = [f"| victim | {' | '.join(STATES)} | kills |", f"|---|{'---:|' * (len(STATES) + 1)}"]
    for victim in victims:
        cells = [counts[victim, state] for state in STATES]
        lines.append(f"| {victim} | {' | '.join(map(str, cells))} | {sum(cells)} |")
    sums = [sum(counts[victim, state] for victim in victims) for state in STATES]
    lines.append(f"| **all** | {' | '.join(map(str, sums))} | {len(record.kills)} |")
    return "\n".join(lines)


def print_summary(record: Record) -> None:
    print(table(record))
    print(f"{len(record.kills)} kills, {record.runs} runs, {len(record.differing)} differing files")


def page(record: Record, load: float) -> str:
    facts = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": f"`{shlex.join(['python', '-m', 'tests.pipeline.kills', *sys.argv[1:]])}` (`make kills`)",
        "seed": record.seed,
        "took": f"{record.seconds / 60:.0f} min",
        "machine": f"{cpu_model()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.1f} GiB",
        "system": platform.platform(),
        "load average before": f"{load:.2f}",
        "versions": ", ".join(f"{name} {version}" for name, version in environment().items()),
    }
    listed = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    differing = "none" if not record.differing else ", ".join(f"`{name}`" for name in record.differing)
    rows = "".join(f"\n- {row}" for row in record.rows_differing[:50])
    return f"""# Kills, {facts["date"][:10]}

SIGKILL at random moments of image runs of {record.shards} shards ({record.rows} rows, some of which the server answers
badly), until each run is done; then every content byte of `pairs` and `images` is compared with an undisturbed run's.
Written by `tests/pipeline/kills.py`, which also says who the victims are; no figure here is typed by hand.

{listed}

{table(record)}

| | |
|---|---:|
| runs | {record.runs} |
| times `unclip run` was called | {record.calls} |
| runs that gave up after the kill of a part, and were called again | {record.gave_up} |
| rows, each run | {record.rows} |
| files compared | {record.files:,} |
| bytes compared | {record.bytes:,} |
| files that differ, are missing, or are too many | {len(record.differing)} |
| rows lost, doubled or ended differently | {len(record.rows_differing)} |

Files that differ: {differing}.{rows} The states are what the run's folder said in the moment before the kill.
"""
