"""The figures, for a terminal and as a dated Markdown page. Every one comes from the run."""

import importlib.metadata
import os
import platform
import shlex
import sys
import textwrap
import time
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.ingest.figures import Figures, Series, Target
from benchmarks.ingest.measure import AT_ONCE, DEAD_SHARE, DELAY_MS, Scale
from benchmarks.machine import cpu_model
from cluster.environment import environment

HEADER = ("measured", "median", "min … max", "repeats", "unit")
TARGETS_HEADER = ("promised", "measured", "bound", "met")
SECTIONS = {
    "The whole thing": ("pictures.", "ours.", "peer.", "bare.peak"),
    "Floors": ("floor.",),
    "Quality": ("quality.",),
    f"Answers that come {DELAY_MS} ms late": ("latency.",),
    f"{DEAD_SHARE:.0%} of the rows on dead hosts": ("dead.",),
}
LIBRARIES = ("httptools", "uvloop", "simplejpeg", "opencv-python-headless")


def facts_of(scale: Scale, peer: str | None, load: float, took_s: float) -> dict[str, str]:
    """What a reader must know to compare: when, where, with what."""
    versions = environment()
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": f"`{shlex.join(['python', '-m', 'benchmarks.ingest', *sys.argv[1:]])}`",
        "took": f"{took_s:.0f} s",
        "rows": f"{scale.rows} in shards of {scale.shard_rows}",
        "machine": f"{cpu_model()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.1f} GiB",
        "system": platform.platform(),
        "load average before": f"{load:.2f}",
        "img2dataset": peer or "left out",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def print_tables(figures: Figures) -> None:
    console = Console()
    tables = [(HEADER, _rows(figures, prefixes)) for prefixes in SECTIONS.values()]
    for header, rows in [*tables, (TARGETS_HEADER, _target_rows(figures))]:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for index, title in enumerate(header):
            table.add_column(title, justify="left" if index == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()


def markdown(figures: Figures, facts: dict[str, str]) -> str:
    facts_list = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    sections = "\n\n".join(
        f"## {title}\n\n{textwrap.fill(_NOTES[index], 120)}\n\n{_table(HEADER, _rows(figures, prefixes))}"
        for index, (title, prefixes) in enumerate(SECTIONS.items())
    )
    return f"""# Ingest, {facts["date"][:10]}

JPEGs of 512 px (smaller side) to 256 px webdataset shards, from a server on loopback that answers from memory in a
process of its own, on the same cores: img2dataset's own command and `unclip run --until images` over Ray with every
guard on. Written by `python -m benchmarks.ingest`; no figure here is typed by hand.

{facts_list}

## What is promised

{_table(TARGETS_HEADER, _target_rows(figures))}

*What decode + fetch + server allow* is {figures.allowed_rate:,.0f} images/s: the cores, over the core-seconds that an
image costs in our decoder alone, in our fetcher alone and in the server during our runs.

{sections}
"""


_NOTES = (
    f"Both ask for {AT_ONCE} pictures at a time in each of two processes. *In its shards*: rows over the time from "
    "the start of the first shard to the end of the last; the whole command begins before Python does and ends "
    "after its last process. Memory is the sum of the proportional set sizes of all processes, the highest sample "
    "of a run of its own.",
    "Decoding alone: the same pictures in memory, decode, resize, encode and hash, in two processes at once. "
    "Fetching alone: bodies are thrown away; core-ms are the client's own. The bare client reads nothing but the "
    "length: that is what loopback and the server allow. Pictures of 480 px cannot be decoded at half size, since "
    "240 px are too few.",
    "Against the area average of the original in float64 (benchmarks/ingest/quality.py), means over a sample.",
    "Requests in flight as the server counts them (read, not yet answered), over the cores of the machine, while "
    "rows are left to be asked for. A run that stores pictures is bound by decoding: it asks as far ahead as its "
    "buffer holds. Fetching alone is what latency binds.",
    "Rows on addresses that accept and never answer, each its own host, shuffled among the living. The rate is "
    "that at which 99% of the living are answered, from the first answer on; the buffer is kept small, so that "
    "pictures are asked for as they are decoded.",
)


def _rows(figures: Figures, prefixes: tuple[str, ...]) -> list[tuple[str, ...]]:
    rows = []
    for key, series in figures.series.items():
        if key.startswith(prefixes):
            scaled = _scaled(series)
            spread = "" if len(scaled.values) == 1 else f"{_n(min(scaled.values))} … {_n(max(scaled.values))}"
            rows.append((scaled.what, _n(scaled.median), spread, str(len(scaled.values)), scaled.unit))
    return rows


def _scaled(series: Series) -> Series:
    if series.unit != "bytes":
        return series
    return Series(series.what, "GB", [value / 1e9 for value in series.values])


def _target_rows(figures: Figures) -> list[tuple[str, ...]]:
    return [_target_row(target) for target in figures.targets()]


def _target_row(target: Target) -> tuple[str, ...]:
    bound = f"{'≥' if target.at_least else '≤'} {target.bound:g}"
    return (target.what, f"{_n(target.value)} {target.unit}".strip(), bound, "yes" if target.met else "**no**")


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    rule = "|".join(["---"] + ["---:"] * (len(header) - 1))
    return "\n".join([f"| {' | '.join(header)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)])


def _n(value: float) -> str:
    size = abs(value)
    return (
        f"{value:,.0f}"
        if size >= 100
        else f"{value:.1f}"
        if size >= 10
        else f"{value:.2f}"
        if size >= 1
        else f"{value:.4f}"
    )
