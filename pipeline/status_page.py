"""What `unclip status` prints: stages, what became of the rows, and what a person should know or do."""

from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.words import duration_in_words

Plain = dict[str, Any]
STATES = {"published": "green", "running": "bold cyan", "unfinished": "yellow", "waiting": "dim"}


def print_status(found: Plain) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has no edge
    driver = found["driver"]
    who = f"process {driver['pid']} on {driver['host']} is at work" if driver else "no driver is at work"
    console.print(f"{found['run']}: {who}", soft_wrap=True, markup=False)
    console.print(_stages(found["stages"]))
    for stage in found["stages"]:
        if stage["unfinished"] or stage["state"] == "running":
            console.print(f"{stage['name']}: {stage['note']}", soft_wrap=True, markup=False)
        if stage["warning"]:
            console.print(f"{stage['name']}: {stage['warning']}", style="bold yellow", soft_wrap=True, markup=False)
    if found["outcomes"]:
        console.print()
        console.print(_rows(found))
    _print_notes(console, found)


def _stages(stages: list[Plain]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("stage", overflow="fold")  # where the terminal is narrow, names break and no number does
    for title in ("state", "shards", "rows", "rate", "time", "left"):
        table.add_column(title, justify="left" if title == "state" else "right", no_wrap=True)
    for stage in stages:
        table.add_row(
            stage["name"],
            Text(stage["state"], style=STATES.get(stage["state"], "")),
            _of(stage["shards"], stage["shards_total"]),
            f"{stage['rows']:,}" if stage["rows"] else "",
            _rate(stage) if stage["rate"] else "",
            duration_in_words(stage["seconds"]) if stage["seconds"] else "",
            duration_in_words(stage["left_s"]) if stage["left_s"] is not None else "",
        )
    return table


def _rate(stage: Plain) -> str:
    return f"{stage['rate']:,.{0 if stage['rate'] >= 10 else 1}f} {stage['unit']}/s"


def _of(done: int, total: int) -> str:
    if not total:
        return f"{done:,}" if done else ""
    return f"{total:,}" if done == total else f"{done:,}/{total:,}"


def _rows(found: Plain) -> Columns:
    """Outcomes, reasons and hosts, side by side where they fit."""
    rows = sum(found["outcomes"].values())
    outcomes = _table(("images", "left"), ("rows", "right"), ("", "right"))
    for name, count in found["outcomes"].items():
        outcomes.add_row(name, f"{count:,}", f"{count / rows:.1%}")
    sampled = f" in {found['read']:,} of {found['of']:,} shards" if found["read"] < found["of"] else ""
    tables = [outcomes]
    for key, title in (("reasons", "most frequent reasons"), ("failing_hosts", "hosts that fail most")):
        if found[key]:
            table = _table((title + sampled, "left"), ("rows", "right"))
            for name, count in found[key].items():
                table.add_row(Text(name), f"{count:,}")
            tables.append(table)
    return Columns(tables, padding=(0, 4))


def _print_notes(console: Console, found: Plain) -> None:
    def say(line: str, style: str) -> None:
        console.print(line, style=style, soft_wrap=True, markup=False)

    for held in found["held"]:
        say(f"held: {held['artifact']} shard {held['shard']}: {held['why']}", "yellow")
    if found["held"]:
        first = found["held"][0]
        prefix = "" if first["artifact"] == "images" else f"{first['artifact']}:"
        say(
            "Nothing of a held revision is published. The next `unclip run` does these shards again; "
            f"--accept {prefix}{first['shard']} takes one as it is.",
            "yellow",
        )
    if found["removed"]:
        say(f"{found['removed']:,} pairs are removed for good (takedowns/ says when)", "dim")
    if found["takedown"] is not None:
        say(
            f"takedown {found['takedown']} was not brought to its end: repeat it, or run again, and it will be.",
            "bold yellow",
        )
    for fault in found["broken"]:
        say(f"broken: {fault}", "red")


def _table(*columns: tuple[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title, justify in columns:
        table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    return table
