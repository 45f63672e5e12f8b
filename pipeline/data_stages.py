"""The stages that make data: pairs, images, embeddings, dedup, view, pca."""

from collections import Counter
from typing import Any

from cluster.artifact import Artifact
from ingest.partition import build_pairs as partition
from pipeline.config import RunConfig
from pipeline.sources import RunSources
from pipeline.stage import Build

Plain = dict[str, Any]


def pairs_settings(sources: RunSources, name: str, config: RunConfig) -> Plain:
    source = config.source
    return {
        "source": sources.identity(name),
        "columns": [source.url_column, source.caption_column],
        "shard_rows": config.images.shard_rows,
    }


def build_pairs(sources: RunSources, build: Build) -> int:
    progress = build.progress

    def report(done: Plain) -> None:
        progress.report({"done": done["rows"], "total": done["rows"], "unit": "rows"})

    totals = partition(
        sources.open(build.name), build.workshop, shard_rows=build.config.images.shard_rows, report=report
    )
    return totals["shards"]


def images_settings(sources: RunSources, pairs_name: str, config: RunConfig) -> Plain:
    """A folder's pairs name files, not bytes: what the files are must be said here."""
    settings = config.images.content_settings()
    if sources.picture_folder(pairs_name) is not None:
        settings["folder"] = sources.identity(pairs_name)
    return settings


def build_images(sources: RunSources, build: Build) -> int:
    pairs_name = build.name.removesuffix("images") + "pairs"
    tasks_input = {"pairs": build.inputs[pairs_name].uri, "folder": sources.picture_folder(pairs_name)}
    with sources.serving():
        return _over_shards(
            build,
            "ingest.images:ImagesWorker",
            build.config.images.model_dump(mode="json"),
            build.inputs[pairs_name],
            tasks_input,
        )


def build_embeddings(build: Build) -> int:
    images_name = build.name.removesuffix("embeddings") + "images"
    images = build.inputs[images_name]
    return _over_shards(
        build,
        "embed.encode:EmbeddingsWorker",
        {"clip": build.inputs["clip"].uri, "config": build.config.embeddings.model_dump(mode="json")},
        images,
        {"images": images.uri},
    )


def build_dedup(build: Build) -> int:
    evaluation = {
        name.split("/")[1]: artifact.uri
        for name, artifact in build.inputs.items()
        if name.startswith("evaluation/") and name.endswith("/embeddings")
    }
    images = {name: build.inputs[f"evaluation/{name}/images"].uri for name in evaluation}
    return _call(
        build,
        "embed.dedup:member",
        {"embeddings": build.inputs["embeddings"].uri, "evaluation": evaluation, "evaluation_images": images},
        build.config.dedup.model_dump(mode="json"),
    )


def build_view(build: Build) -> int:
    payload = {"embeddings": build.inputs["embeddings"].uri, "dedup": build.inputs["dedup"].uri}
    return _call(build, "embed.view:member", payload, build.config.view.model_dump(mode="json"))


def build_pca(build: Build) -> int:
    payload = {"embeddings": build.inputs["embeddings"].uri, "view": build.inputs["view"].uri}
    return _call(build, "embed.pca:member", payload, build.config.pca.model_dump(mode="json"))


def _over_shards(build: Build, worker: str, kwargs: Plain, source: Artifact, inputs: Plain) -> int:
    """Map a worker over the shards of `source` that have no receipt yet."""
    build.workshop.recover()
    committed = build.workshop.committed()
    waiting = [entry for entry in source.shards if entry.shard not in committed]
    build.progress.begin(source.rows, "rows", done=source.rows - sum(entry.rows for entry in waiting))
    out = build.workshop.plain()
    tasks = [{"shard": entry.shard, "rows": entry.rows, "out": out} | inputs for entry in waiting]
    totals: Counter[str] = Counter()
    done = source.shard_count - len(waiting)

    def count(task: Plain, result: Plain) -> None:
        nonlocal done
        done += 1
        totals.update(result["counts"])
        apart = "".join(f", {number:,} {outcome}" for outcome, number in totals.items() if outcome != "ok" and number)
        build.progress.advance(task["rows"], f"{done}/{source.shard_count} shards{apart}")

    build.session.map_shards(worker, kwargs, tasks, on_result=count)
    return source.shard_count


def _call(build: Build, function: str, inputs: Plain, config: Plain) -> int:
    payload = {"config": config, "out": build.workshop.plain()} | inputs
    result = build.session.call(function, payload, on_report=build.progress.report)
    return int(result.get("shards", 1))
