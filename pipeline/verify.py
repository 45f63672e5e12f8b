"""`unclip verify`: bytes against receipts, rows against the ledger, embeddings against their pictures.

An artifact is checked alone where it is all that is given; within a run it is also checked against what it was made of.
"""

from collections.abc import Iterator
from typing import Any

from rich.console import Console

from cluster.artifact import Artifact, read_manifest
from cluster.check import find_faults
from cluster.errors import UserError
from cluster.storage import Folder
from embed.config import EmbeddingsConfig
from ingest.verify import find_image_faults
from pipeline.config import parse_config
from pipeline.runner import stored_config
from pipeline.sources import RunSources
from pipeline.stages import stages_of

Plain = dict[str, Any]


def verify_uri(target: Folder, sample: int | None) -> Plain:
    """{"target", "artifacts": […], "findings": [{"artifact", "check", "detail", …}]}; `sample` None means all rows."""
    checked, findings = [], []
    for name, artifact, run in _artifacts(target):
        checked.append(
            {
                "name": name,
                "rows": artifact.rows,
                "shards": artifact.shard_count,
                "content_digest": artifact.content_digest,
            }
        )
        findings += [{"artifact": name} | finding for finding in _findings(artifact, run, sample)]
    return {"target": target.uri, "artifacts": checked, "findings": findings}


def print_findings(found: Plain) -> None:
    console = Console(highlight=False)
    for artifact in found["artifacts"]:
        wrong = sum(finding["artifact"] == artifact["name"] for finding in found["findings"])
        verdict = f"{wrong} findings" if wrong else "sound"
        console.print(f"{artifact['name']}: {artifact['shards']} shards, {artifact['rows']:,} rows: {verdict}")
    for finding in found["findings"]:
        where = "".join(f" {key} {finding[key]}" for key in ("shard", "row") if finding.get(key) is not None)
        console.print(f"  {finding['artifact']}{where}: {finding['detail']}", style="red", soft_wrap=True)


def _artifacts(target: Folder) -> Iterator[tuple[str, Artifact, Folder | None]]:
    """(name, artifact, the run that it belongs to) of everything published at `target`."""
    manifest = read_manifest(target)
    if manifest is not None:
        run = target
        for _ in manifest.identity["kind"].split("/"):
            run = Folder(run.uri.rsplit("/", 1)[0])
        yield manifest.identity["kind"], Artifact(target, manifest), run if run.exists("run.json") else None
        return
    if not target.exists("run.json"):
        raise UserError(f"{target.uri} is neither a run (run.json) nor an artifact (manifest.json).")
    config = parse_config(stored_config(target), f"{target.uri}/run.json")
    for stage in stages_of(config, RunSources(config, target)):
        manifest = read_manifest(target / stage.name)
        if manifest is not None:
            yield stage.name, Artifact(target / stage.name, manifest), target


def _findings(artifact: Artifact, run: Folder | None, sample: int | None) -> Iterator[Plain]:
    broken = False
    for fault in find_faults(artifact):
        broken = True
        yield {"check": "bytes", "detail": fault}
    if run is None or broken:
        return  # what is not its own bytes any more cannot be compared with anything
    inputs = {name: read_manifest(run / name) for name in artifact.manifest.inputs}
    for name, manifest in inputs.items():
        if manifest is None:
            yield {"check": "inputs", "detail": f"its input {name} is not published"}
        elif manifest.content_digest != artifact.manifest.inputs[name]:
            yield {"check": "inputs", "detail": f"its input {name} has changed since: `unclip run` makes it again"}
    if any(manifest is None for manifest in inputs.values()):
        return
    opened = {name: Artifact(run / name, manifest) for name, manifest in inputs.items() if manifest is not None}
    kind = artifact.manifest.kind
    if kind.endswith("images"):
        pairs = next(value for name, value in opened.items() if name.endswith("pairs"))
        yield from ({"check": "rows", "detail": fault} for fault in find_image_faults(artifact, pairs))
    if kind.endswith("embeddings"):
        yield from _embedding_findings(artifact, opened, sample)


def _embedding_findings(artifact: Artifact, opened: dict[str, Artifact], sample: int | None) -> Iterator[Plain]:
    from dataclasses import asdict

    from embed.verify import verify_embeddings

    images = next(value for name, value in opened.items() if name.endswith("images"))
    config = EmbeddingsConfig.model_validate(artifact.manifest.identity["settings"])
    for finding in verify_embeddings(artifact.uri, images.uri, opened["clip"].uri, config, sample=sample):
        yield asdict(finding)
