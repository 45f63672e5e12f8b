"""`unclip run`: what is checked before any work, and what a person is told after it."""

import time
from collections.abc import Sequence

from rich.console import Console

from cluster.errors import UserError
from cluster.lease import Lease
from cluster.storage import Folder
from ingest.outcome import Status
from pipeline import runner
from pipeline.config import RunConfig
from pipeline.held import check_accepted
from pipeline.preflight import preflight
from pipeline.sources import RunSources
from pipeline.stage import Wishes
from pipeline.stages import stages_of, until_stage, upstream_of
from pipeline.takedown import finish_takedown, pending_takedown

RETRYABLE = (Status.FETCH_FAILED, Status.REFUSED, Status.UNDECODABLE, Status.FILTERED)


def wishes_of(
    *, rebuild: str | None, retry: str | None, accept: Sequence[str], grow: bool, prune: bool, allow_mixed: bool
) -> Wishes:
    """The options of `unclip run`, checked. Raises `UserError`."""
    statuses = tuple(word.strip() for word in retry.split(",")) if retry else ()
    if unknown := [word for word in statuses if word not in RETRYABLE]:
        raise UserError(f"--retry {unknown[0]!r} is no status that can be tried again: {', '.join(RETRYABLE)}.")
    if prune and not grow:
        raise UserError("--prune removes what a new snapshot of the source lacks; it needs --grow.")
    accepted: dict[str, set[int]] = {}
    for word in accept:
        artifact, _, shards = word.rpartition(":")
        if not all(shard.isdigit() for shard in shards.split(",")):
            raise UserError(f"--accept {word!r}: expected shard numbers, as in 3,17 or evaluation/NAME/images:0.")
        accepted.setdefault(artifact or "images", set()).update(int(shard) for shard in shards.split(","))
    return Wishes(
        rebuild=rebuild,
        retry=tuple(sorted(set(statuses))),
        accept={name: frozenset(shards) for name, shards in accepted.items()},
        grow=grow,
        prune=prune,
        allow_mixed=allow_mixed,
    )


def drive(config: RunConfig, folder: Folder, wishes: Wishes, *, until: str | None) -> None:
    """Run `config` at `folder`. Raises `UserError` before any work where the request is wrong."""
    console = Console(stderr=True, highlight=False)
    sources, rebuild = RunSources(config, folder, wishes), wishes.rebuild
    stages = stages_of(config, sources)
    names = [stage.name for stage in stages]
    for option, name in (("--until", until), ("--rebuild", rebuild)):
        if name is not None and name not in names:
            raise UserError(f"{option} {name!r} is no stage of this run; its stages: {', '.join(names)}.")
    if until is not None:
        stages = until_stage(stages, until)
    if rebuild is not None and rebuild not in [stage.name for stage in stages]:
        raise UserError(f"--rebuild {rebuild}: --until {until} does not reach it.")
    check_accepted(folder, wishes.accept)
    sources.check()
    folder.make()
    if pending_takedown(folder) is not None:
        with Lease(folder) as lease:
            number = finish_takedown(folder, lease)
        console.print(f"{folder.uri}: finished takedown {number}, which had been killed.", soft_wrap=True)
    states = runner.states(stages, config, folder, wishes)
    if all(state == "current" for state in states.values()):
        console.print(f"{folder.uri}: nothing to do, {len(stages)} stages are current.", soft_wrap=True)
        _say_results(console, folder)
        return
    if rebuild is not None:
        below = [stage.name for stage in stages if rebuild in upstream_of(stages, stage.name)]
        console.print(_cost_line(folder, rebuild, below), soft_wrap=True)
    for line in preflight(config, folder, states, sources, wishes.retry):
        console.print(line, soft_wrap=True)
    started = time.monotonic()
    outcome = runner.run(stages, config, folder, wishes, console=console)
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
