"""Walks the stages in order, skips what is current, builds what is missing, and never mixes.

For every stage there are six answers, found before any work starts:

    current    published with this identity: nothing to do
    missing    nothing there, or an earlier run of this identity left it unfinished
    stale      published with these settings, but an input's content has changed since: a new revision is built
    amend      published, and some of its rows are asked for again (--retry), or its source has grown (--grow)
    rebuild    asked for by name
    other      built, or begun, with other settings: the run stops and names the fields that differ
"""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console

from cluster.artifact import Artifact, Request, read_manifest, read_requests
from cluster.canonical import canonical_json
from cluster.environment import environment
from cluster.errors import UserError
from cluster.lease import Lease
from cluster.session import Session
from cluster.storage import Folder
from cluster.workshop import begin
from pipeline.config import RunConfig
from pipeline.progress import Display
from pipeline.stage import Build, Stage, Wishes

State = Literal["current", "missing", "stale", "amend", "rebuild"]


@dataclass
class Outcome:
    """What a run did."""

    built: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def states(
    stages: Iterable[Stage],
    config: RunConfig,
    folder: Folder,
    wishes: Wishes = Wishes(),  # noqa: B008
) -> dict[str, State]:
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
        if stage.name == wishes.rebuild:
            found[stage.name] = "rebuild"
        elif _grows(stage, config, target, wishes):
            found[stage.name] = "amend"
        elif not _settings_match(stage, config, target) or manifest is None:
            found[stage.name] = "missing"
        elif inputs_known and manifest.inputs == {name: digests[name] for name in stage.inputs}:
            found[stage.name] = "amend" if _amendment(stage, target, wishes) else "current"
            digests[stage.name] = manifest.content_digest
        else:
            found[stage.name] = "stale"
    return found


def run(
    stages: list[Stage],
    config: RunConfig,
    folder: Folder,
    wishes: Wishes = Wishes(),  # noqa: B008
    *,
    console: Console | None = None,
) -> Outcome:
    """Build what is missing, in order. Safe to repeat, and to kill at any moment."""
    outcome = Outcome()
    found = states(stages, config, folder, wishes)
    if all(state == "current" for state in found.values()):
        return outcome
    folder.make()
    with Lease(folder) as lease:
        folder.write("run.json", json.dumps({"config": config.model_dump(mode="json")}, indent=1).encode())
        with Display([stage.name for stage in stages], folder, console) as display, Session(config.cluster) as session:
            for stage in stages:
                target = folder / stage.name
                inputs = {name: Artifact.open(folder / name) for name in stage.inputs}
                request = stage.request(config, {name: inputs[name].content_digest for name in stage.inputs})
                published = Artifact.open(target) if read_manifest(target) is not None else None
                amends = _amendment(stage, target, wishes)
                if stage.name != wishes.rebuild and amends is None and _is_built(published, request):
                    display.current(stage.name)
                    continue
                workshop = begin(target, request, environment(), allow_mixed=wishes.allow_mixed, amends=amends)
                base = published if stage.name != wishes.rebuild and _may_stand(published, request) else None
                with display.running(stage.name) as progress:
                    build = Build(
                        stage.name, config, folder, inputs, workshop, session, progress, wishes, base, amends or {}
                    )
                    shards = stage.run(build)
                    workshop.publish(shards, fence=lease.check, inherit=build.inherited)
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


def _is_built(published: Artifact | None, request: Request) -> bool:
    return published is not None and published.manifest.identity == json.loads(canonical_json(request.identity))


def _may_stand(published: Artifact | None, request: Request) -> bool:
    """May shards of what is published be taken over? With other inputs, shard by shard; with other settings, none.

    A grown source is no other setting: its earlier snapshots are what the shards were made from.
    """
    if published is None:
        return False
    differing = request.differing_fields(published.manifest.identity, with_inputs=False)
    return not differing or _snapshots(published.manifest.identity)[1] == _snapshots(request.identity)[1]


def _snapshots(identity: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The snapshots of a source that an identity names, and the identity without them."""
    plain = json.loads(canonical_json(identity))
    return plain["settings"].pop("snapshots", []), plain


def _grows(stage: Stage, config: RunConfig, target: Folder, wishes: Wishes) -> bool:
    """Is there something published that lacks only the newest snapshot of its source, and growth asked for?"""
    manifest = read_manifest(target)
    if not wishes.grow or manifest is None:
        return False
    had, rest = _snapshots(manifest.identity)
    asked, same = _snapshots(stage.request(config, {}).identity | {"inputs": manifest.inputs})
    return rest == same and had != asked and had == asked[: len(had)] and bool(had)


def _amendment(stage: Stage, target: Folder, wishes: Wishes) -> dict[str, Any] | None:
    """How a published artifact is to be changed by this run, as its request file remembers it.

    A retry that was begun and not published is brought to its end, asked for again or not.
    """
    manifest = read_manifest(target)
    if manifest is None or stage.section != "images":
        return None
    if asked := [status for status in wishes.retry if manifest.totals["counts"].get(status)]:
        return {"retry": asked, "revision": manifest.revision}
    requests = read_requests(target)
    begun: dict[str, Any] = requests[max(requests)].get("amends") or {}
    return begun if "retry" in begun and begun["revision"] == manifest.revision else None


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
        grown = _snapshots(candidates[0])[1] == _snapshots(asked.identity | {"inputs": candidates[0]["inputs"]})[1]
        raise UserError(
            f"{target.uri} was {verb} with {'another source' if grown else 'other settings'}: "
            f"{'; '.join(differing[0][:6])}. {'Add what is new in it with --grow, build' if grown else 'Build'} "
            f"elsewhere with another --out, or replace it, and what follows from it, with --rebuild {stage.name}."
        )
    return manifest is not None and not differing[0]


def _append_timing(folder: Folder, name: str, plain: dict[str, Any]) -> None:
    earlier = folder.read("timings.jsonl") if folder.exists("timings.jsonl") else b""
    line = json.dumps({"time": time.time()} | plain, sort_keys=True).encode() + b"\n"
    folder.write("timings.jsonl", earlier + line)
