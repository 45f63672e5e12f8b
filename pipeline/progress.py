"""What a person sees while a run works: one live table on a terminal, plain lines elsewhere.

The same numbers go to `<run>/progress.json`, replaced every few seconds, so that `unclip status` in another terminal,
or on another machine, shows them too.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.storage import Folder
from pipeline.words import duration_in_words

WRITE_EVERY_S = 2.0
LINE_EVERY_S = 15.0


@dataclass
class StageProgress:
    """How far one stage is. `unit` is what `done` counts: rows, steps, pictures."""

    name: str
    state: str = "waiting"  # waiting, current, running, done, failed
    done: float = 0.0
    total: float = 0.0
    unit: str = ""
    note: str = ""
    warning: str = ""
    seconds: float = 0.0
    _started: float = field(default=0.0, repr=False)
    _rate_from: tuple[float, float] | None = field(default=None, repr=False)
    _moved: "Callable[[StageProgress], None]" = field(default=lambda stage: None, repr=False)
    _warned: "Callable[[StageProgress], None]" = field(default=lambda stage: None, repr=False)

    def begin(self, total: float, unit: str, *, done: float = 0.0) -> None:
        """Say how much there is to do, and how much an earlier run has done."""
        self.total, self.unit, self.done = total, unit, done
        self._rate_from = (time.monotonic(), done)

    def advance(self, done: float, note: str = "") -> None:
        self.done += done
        self.note = note or self.note
        self._moved(self)

    def warn(self, warning: str) -> None:
        """Say what holds the stage up; an empty word takes it back."""
        if warning != self.warning:
            self.warning = warning
            self._warned(self)

    def report(self, report: dict[str, Any]) -> None:
        """Take a gang's report: `step` of `steps` with its `loss`, or `done` of `total` `unit`."""
        if "step" in report:
            if self.unit != "steps" or self.total != report["steps"]:
                self.begin(report["steps"], "steps", done=report["step"] - 1)
            self.done = report["step"]
            if "loss" in report:
                self.note = f"loss {report['loss']:.4f}"
        elif "done" in report:
            if self.total != report["total"]:
                self.begin(report["total"], report.get("unit", ""))
            self.done = report["done"]
        self.note = report.get("note", self.note)
        self._moved(self)

    @property
    def rate(self) -> float:
        """Units a second since this run began with the stage."""
        if self._rate_from is None:
            return 0.0
        since, done = self._rate_from
        elapsed = (time.monotonic() - since) if self.state == "running" else self.seconds
        return (self.done - done) / elapsed if elapsed > 0 else 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds left, where a rate is known."""
        return (self.total - self.done) / self.rate if self.state == "running" and self.rate > 0 else None

    def plain(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "state": self.state,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "note": self.note,
            "warning": self.warning,
            "seconds": round(self.elapsed, 3),
            "rate": round(self.rate, 3),
            "left_s": None if self.left_s is None else round(self.left_s, 1),
        }

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._started if self.state == "running" else self.seconds


class Display:
    """The live table of a run's stages. Use as a context manager; writes to stderr."""

    def __init__(self, stages: list[str], folder: Folder, console: Console | None = None) -> None:
        self.stages = {name: StageProgress(name, _moved=self._tick, _warned=self._warn) for name in stages}
        self._folder = folder
        self._console = console or Console(stderr=True)
        self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=4, transient=False)
        self._interactive = self._console.is_terminal
        self._written = self._said = 0.0

    def __enter__(self) -> Self:
        if self._interactive:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._interactive:
            self._live.stop()
        self._write()

    @contextmanager
    def running(self, name: str) -> Iterator[StageProgress]:
        """Show a stage as running until the block ends; done where it ends well."""
        stage = self.stages[name]
        stage.state, stage._started = "running", time.monotonic()
        self._say(f"{name} …")
        try:
            yield stage
        except BaseException:
            stage.seconds, stage.state = time.monotonic() - stage._started, "failed"
            raise
        stage.seconds, stage.state = time.monotonic() - stage._started, "done"
        if stage.total:
            stage.done = stage.total
        self._write()
        told = ", ".join(part for part in (_amount(stage), stage.note) if part)
        self._say(f"{name} done in {stage.seconds:.1f} s{f' ({told})' if told else ''}")

    def current(self, name: str) -> None:
        self.stages[name].state = "current"

    def _tick(self, stage: StageProgress) -> None:
        now = time.monotonic()
        if now - self._written > WRITE_EVERY_S:
            self._write()
        if now - self._said > LINE_EVERY_S:
            left = "" if stage.left_s is None else f", {duration_in_words(stage.left_s)} left"
            self._say(f"{stage.name} {_amount(stage)} {stage.note}{left}")

    def _warn(self, stage: StageProgress) -> None:
        self._write()
        self._say(f"{stage.name}: {stage.warning or 'goes on'}")

    def _say(self, line: str) -> None:
        self._said = time.monotonic()
        if not self._interactive:
            self._console.print(Text(line), soft_wrap=True, highlight=False)

    def _write(self) -> None:
        self._written = time.monotonic()
        plain = {"time": time.time(), "stages": [stage.plain() for stage in self.stages.values()]}
        self._folder.write("progress.json", json.dumps(plain, indent=1).encode())

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for title, justify in (
            ("stage", "left"),
            ("", "left"),
            ("done", "right"),
            ("rate", "right"),
            ("time", "right"),
            ("left", "right"),
            ("", "left"),
        ):
            table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        marks = {
            "waiting": ("·", "dim"),
            "current": ("✓", "dim"),
            "running": ("▸", "bold"),
            "done": ("✓", "green"),
            "failed": ("✗", "red"),
        }
        for stage in self.stages.values():
            mark, style = marks[stage.state]
            busy = stage.state in ("running", "done", "failed")
            table.add_row(
                Text(f"{mark} {stage.name}", style=style),
                _bar(stage) if stage.state == "running" else Text(""),
                _amount(stage) if busy else "",
                f"{stage.rate:,.0f} {stage.unit}/s"
                if busy and stage.rate >= 10
                else f"{stage.rate:,.1f} {stage.unit}/s"
                if busy and stage.rate
                else "",
                duration_in_words(stage.elapsed) if busy else "",
                duration_in_words(stage.left_s) if stage.left_s is not None else "",
                Text(stage.warning, style="yellow") if stage.warning else Text(stage.note, style="dim"),
            )
        return table


def _bar(stage: StageProgress, width: int = 16) -> Text:
    share = min(1.0, stage.done / stage.total) if stage.total else 0.0
    full = round(share * width)
    return Text("━" * full, style="cyan") + Text("━" * (width - full), style="grey30")


def _amount(stage: StageProgress) -> str:
    if not stage.total:
        return ""
    return f"{stage.done:,.0f}/{stage.total:,.0f} {stage.unit}"
