"""`unclip run`: what is checked before any work, and what a person is told after it."""

import time

from rich.console import Console

from cluster.errors import UserError
from cluster.storage import Folder
from pipeline import runner
from pipeline.config import RunConfig
from pipeline.sources import RunSources
from pipeline.stages import stages_of, until_stage, upstream_of


def drive(config: RunConfig, folder: Folder, *, until: str | None, rebuild: str | None, allow_mixed: bool) -> None:
    """Run `config` at `folder`. Raises `UserError` before any work where the request is wrong."""
    console = Console(stderr=True, highlight=False)
    sources = RunSources(config, folder)
    stages = stages_of(config, sources)
    names = [stage.name for stage in stages]
    for option, name in (("--until", until), ("--rebuild", rebuild)):
        if name is not None and name not in names:
            raise UserError(f"{option} {name!r} is no stage of this run; its stages: {', '.join(names)}.")
    if until is not None:
        stages = until_stage(stages, until)
    if rebuild is not None and rebuild not in [stage.name for stage in stages]:
        raise UserError(f"--rebuild {rebuild}: --until {until} does not reach it.")
    sources.check()
    folder.make()
    states = runner.states(stages, config, folder, rebuild)
    if all(state == "current" for state in states.values()):
        console.print(f"{folder.uri}: nothing to do, {len(stages)} stages are current.", soft_wrap=True)
        _say_results(console, folder)
        return
    if rebuild is not None:
        below = [stage.name for stage in stages if rebuild in upstream_of(stages, stage.name)]
        console.print(_cost_line(folder, rebuild, below), soft_wrap=True)
    started = time.monotonic()
    outcome = runner.run(stages, config, folder, rebuild=rebuild, allow_mixed=allow_mixed, console=console)
    console.print(f"{len(outcome.built)} stages built in {time.monotonic() - started:.0f} s.", soft_wrap=True)
    _say_results(console, folder)


def _cost_line(folder: Folder, rebuild: str, below: list[str]) -> str:
    took = runner.timings(folder)
    parts = [
        f"{name} ({took[name]['seconds']:.0f} s last time)" if name in took else name for name in [rebuild, *below]
    ]
    following = f"; where its content changes, then {', '.join(parts[1:])}" if below else ""
    return f"building again: {parts[0]}{following}. What is there stays readable until the new one is complete."


def _say_results(console: Console, folder: Folder) -> None:
    for name, label in (("samples/grid.png", "samples"), ("report/report.html", "report")):
        stage, _, file = name.partition("/")
        path = runner.published_file(folder / stage, file)
        if path:
            console.print(f"{label}: {path}", soft_wrap=True)
