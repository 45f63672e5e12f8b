"""Walks the stages in order, skips what is current, builds what is missing, and never mixes.

For every stage there are five answers, found before any work starts:

    current    published with this identity: nothing to do
    missing    nothing there, or an earlier run of this identity left it unfinished
    stale      published with these settings, but an input's content has changed since: a new revision is built
    rebuild    asked for by name
    other      built, or begun, with other settings: the run stops and names the fields that differ
"""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console

from cluster.artifact import Artifact, read_manifest, read_requests
from cluster.canonical import canonical_json
from cluster.environment import environment
from cluster.errors import UserError
from cluster.lease import Lease
from cluster.session import Session
from cluster.storage import Folder
from cluster.workshop import begin
from pipeline.config import RunConfig
from pipeline.progress import Display
from pipeline.stage import Build, Stage

State = Literal["current", "missing", "stale", "rebuild"]


@dataclass
class Outcome:
    """What a run did."""

    built: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def states(stages: Iterable[Stage], config: RunConfig, folder: Folder, rebuild: str | None = None) -> dict[str, State]:
    """Every stage's answer. Raises `UserError` on the first stage that stands there with other settings.

    Whether a stage below a missing one is stale cannot be known yet; it is then told as missing or stale by what is
    there, and asked again when its turn comes.
    """
    found: dict[str, State] = {}
    digests: dict[str, str] = {}
    for stage in stages:
        target = folder / stage.name
        manifest = read_manifest(target)
        inputs_known = all(found[name] == "current" for name in stage.inputs)
        if stage.name == rebuild:
            found[stage.name] = "rebuild"
        elif not _settings_match(stage, config, target) or manifest is None:
            found[stage.name] = "missing"
        elif inputs_known and manifest.inputs == {name: digests[name] for name in stage.inputs}:
            found[stage.name] = "current"
            digests[stage.name] = manifest.content_digest
        else:
            found[stage.name] = "stale"
    return found


def run(
    stages: list[Stage],
    config: RunConfig,
    folder: Folder,
    *,
    rebuild: str | None = None,
    allow_mixed: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Build what is missing, in order. Safe to repeat, and to kill at any moment."""
    outcome = Outcome()
    found = states(stages, config, folder, rebuild)
    if all(state == "current" for state in found.values()):
        return outcome
    folder.make()
    with Lease(folder) as lease:
        folder.write("run.json", json.dumps({"config": config.model_dump(mode="json")}, indent=1).encode())
        with Display([stage.name for stage in stages], folder, console) as display, Session(config.cluster) as session:
            for stage in stages:
                artifact = _current(stage, config, folder) if stage.name != rebuild else None
                if artifact is not None:
                    display.current(stage.name)
                    continue
                inputs = {name: Artifact.open(folder / name) for name in stage.inputs}
                request = stage.request(config, {name: inputs[name].content_digest for name in stage.inputs})
                workshop = begin(folder / stage.name, request, environment(), allow_mixed=allow_mixed)
                with display.running(stage.name) as progress:
                    shards = stage.run(Build(stage.name, config, folder, inputs, workshop, session, progress))
                    workshop.publish(shards, fence=lease.check)
                outcome.built.append(stage.name)
                outcome.seconds[stage.name] = progress.seconds
                _append_timing(folder, stage.name, progress.plain())
    return outcome


def stored_config(folder: Folder) -> dict[str, Any]:
    """The config that the run at `folder` was last driven with."""
    try:
        config: dict[str, Any] = json.loads(folder.read("run.json"))["config"]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder.uri} is not a run: it has no run.json.") from None
    return config


def published_file(target: Folder, name: str) -> str | None:
    """Where a file of a published artifact lies, for a person to open; None where it is not published."""
    manifest = read_manifest(target)
    if manifest is None:
        return None
    artifact = Artifact(target, manifest)
    return next(
        (f"{target.uri}/{entry.stored_as}" for shard in artifact.shards for entry in shard.files if entry.name == name),
        None,
    )


def timings(folder: Folder) -> dict[str, dict[str, Any]]:
    """The newest timing of every stage: seconds, done, unit."""
    if not folder.exists("timings.jsonl"):
        return {}
    lines = (json.loads(line) for line in folder.read("timings.jsonl").splitlines())
    return {line["name"]: line for line in lines}


def _current(stage: Stage, config: RunConfig, folder: Folder) -> Artifact | None:
    manifest = read_manifest(folder / stage.name)
    if manifest is None:
        return None
    inputs = {name: Artifact.open(folder / name).content_digest for name in stage.inputs}
    asked = json.loads(canonical_json(stage.request(config, inputs).identity))
    return Artifact(folder / stage.name, manifest) if manifest.identity == asked else None


def _settings_match(stage: Stage, config: RunConfig, target: Folder) -> bool:
    """Was what is published built with the settings that are asked for?

    Where it was not, an unfinished revision with these settings (a rebuild that was killed) may go on. Anything else
    that stands there is refused: another recipe's artifact is neither mixed with nor replaced unasked.
    """
    manifest, requests = read_manifest(target), read_requests(target)
    unfinished = max(requests, default=0)
    candidates = [manifest.identity] if manifest is not None else []
    if unfinished > (manifest.revision if manifest is not None else 0):
        candidates.append(requests[unfinished]["identity"])
    asked = stage.request(config, {})
    differing = [asked.differing_fields(identity, with_inputs=False) for identity in candidates]
    if differing and all(differing):
        verb = "built" if manifest is not None else "begun"
        raise UserError(
            f"{target.uri} was {verb} with other settings: {'; '.join(differing[0][:6])}. "
            f"Build elsewhere with another --out, or replace it, and what follows from it, with --rebuild {stage.name}."
        )
    return manifest is not None and not differing[0]


def _append_timing(folder: Folder, name: str, plain: dict[str, Any]) -> None:
    earlier = folder.read("timings.jsonl") if folder.exists("timings.jsonl") else b""
    line = json.dumps({"time": time.time()} | plain, sort_keys=True).encode() + b"\n"
    folder.write("timings.jsonl", earlier + line)
