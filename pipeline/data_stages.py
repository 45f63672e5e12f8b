"""The stages that make data: pairs, images, embeddings, dedup, view, pca."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from cluster.artifact import Artifact, ShardEntry
from cluster.canonical import digest
from cluster.shards import ChosenShards
from ingest.filters_identity import filters_identity
from ingest.growth import grow_pairs
from ingest.limits import limits_settings
from ingest.partition import build_pairs as partition
from ingest.removal import removed_pairs
from pipeline.config import RunConfig
from pipeline.held import HeldShards
from pipeline.sources import RunSources
from pipeline.stage import Build

Plain = dict[str, Any]


def pairs_settings(sources: RunSources, name: str, config: RunConfig) -> Plain:
    return {
        "snapshots": sources.snapshots(name),
        "table": sources.table_format(name).plain(),
        "shard_rows": config.images.shard_rows,
    }


def build_pairs(sources: RunSources, build: Build) -> int:
    """Partition the source, or append what a new snapshot of it brings to the pairs that are there."""
    removed = removed_pairs(build.folder)
    shard_rows = build.config.images.shard_rows
    source = sources.open(build.name)

    def report(done: Plain) -> None:
        build.progress.report({"done": done["rows"], "total": done["rows"], "unit": "rows"})

    if build.published is None or not sources.grown(build.name):
        return partition(source, build.workshop, shard_rows=shard_rows, removed=removed, report=report)["shards"]
    growth = grow_pairs(
        build.published,
        source,
        build.workshop,
        shard_rows=shard_rows,
        removed=removed,
        prune=build.wishes.prune,
        report=report,
    )
    build.inherited = growth.inherited
    build.progress.note = growth.summary()
    return growth.shards


def images_settings(sources: RunSources, pairs_name: str, config: RunConfig) -> Plain:
    """Pairs of pictures that are there already name files, not bytes: what the files are must be said here."""
    settings = config.images.content_settings() | {"filters": filters_identity(config.images.filters)}
    if sources.pictures(pairs_name) is not None:
        settings["pictures"] = sources.identity(pairs_name)
    return settings


def build_images(sources: RunSources, build: Build) -> int:
    pairs_name = build.name.removesuffix("images") + "pairs"
    pairs, config = build.inputs[pairs_name], build.config.images
    retry = build.amends.get("retry", [])
    held = HeldShards(build.workshop, build.wishes.accept.get(build.name, frozenset()))
    held.redo()
    limits = limits_settings(config.connections_per_host, config.requests_per_s_per_host, config.deadline_s)
    with sources.serving():
        shards = _over_shards(
            build,
            ShardWork(
                "ingest.images:ImagesWorker",
                {"config": config.model_dump(mode="json"), "pictures": sources.pictures(pairs_name)},
                {"pairs": pairs.uri, "retry": None if build.published is None else retry},
                in_flight=config.shards_in_flight,
                shared=("ingest.limits:HostLimits", limits),
                goes_back_to=tuple(retry),
            ),
            pairs,
        )
    held.judge(config.hold, shards, build.inherited)
    return shards


def build_embeddings(build: Build) -> int:
    images_name = build.name.removesuffix("embeddings") + "images"
    images, clip = build.inputs[images_name], build.inputs["clip"]
    work = ShardWork(
        "embed.encode:EmbeddingsWorker",
        {"clip": clip.uri, "config": build.config.embeddings.model_dump(mode="json")},
        {"images": images.uri},
        also_from=(clip.content_digest,),
    )
    return _over_shards(build, work, images)


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


@dataclass(frozen=True)
class ShardWork:
    """A worker to map over shards. What a shard is made from: the source's shard, and `also_from` (content digests).

    `goes_back_to` are outcomes: a published shard with rows that ended so is not taken over.
    """

    worker: str
    kwargs: Plain
    task: Plain
    in_flight: int = 1
    shared: tuple[str, Plain] | None = None
    also_from: tuple[str, ...] = ()
    goes_back_to: tuple[str, ...] = ()

    def made_from(self, sha256: str) -> str:
        return digest([sha256, *self.also_from])

    def stands(self, published: ShardEntry, made_from: str) -> bool:
        return published.made_from == made_from and not any(published.counts.get(name) for name in self.goes_back_to)


def _over_shards(build: Build, work: ShardWork, source: Artifact) -> int:
    """Map a worker over the shards of `source` that have no receipt yet and cannot be taken over from what stands."""
    build.workshop.recover()
    committed = build.workshop.committed()
    made_from, rows = [work.made_from(sha256) for sha256 in source.shards.hashes], source.shards.row_counts
    if build.published is not None:
        there = build.published.shards
        still = [n.shard for n in there if n.shard < len(made_from) and work.stands(n, made_from[n.shard])]
        build.inherited = ChosenShards(there, still)
    waiting = [shard for shard in range(len(rows)) if shard not in committed and shard not in build.inherited]
    build.progress.begin(source.rows, "rows", done=source.rows - sum(rows[shard] for shard in waiting))
    out = build.workshop.plain()
    tasks = [
        {"shard": shard, "rows": rows[shard], "out": out, "made_from": made_from[shard]} | work.task
        for shard in waiting
    ]
    totals: Counter[str] = Counter()
    done = source.shard_count - len(waiting)

    def count(task: Plain, result: Plain) -> None:
        nonlocal done
        done += 1
        totals.update(result["counts"])
        apart = "".join(f", {number:,} {outcome}" for outcome, number in totals.items() if outcome != "ok" and number)
        build.progress.advance(task["rows"], f"{done}/{source.shard_count} shards{apart}")

    def tell(report: Plain) -> None:
        build.progress.warn(str(report.get("outage") or ""))

    build.session.map_shards(
        work.worker,
        work.kwargs,
        tasks,
        shared=work.shared,
        in_flight=work.in_flight,
        on_result=count,
        on_shared=tell,
    )
    return source.shard_count


def _call(build: Build, function: str, inputs: Plain, config: Plain) -> int:
    payload = {"config": config, "out": build.workshop.plain()} | inputs
    result = build.session.call(function, payload, on_report=build.progress.report)
    return int(result.get("shards", 1))
