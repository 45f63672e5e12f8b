"""The report: one self-contained HTML page about a run, made of what its artifacts say.

Every section is left out where its artifact is not published yet, so the page can be drawn from an unfinished run.
Scripts and outside resources are none: the page may be mailed, and what a caption holds is escaped.
"""

import base64
import datetime
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.artifact import Artifact, read_manifest
from cluster.environment import environment
from cluster.errors import UserError
from cluster.storage import Folder
from embed.stored_rows import StoredRow, open_pictures, stored_rows
from pipeline import plots
from pipeline.config import RunConfig, parse_config
from pipeline.runner import published_file, stored_config, timings
from pipeline.stage import Build

Plain = dict[str, Any]
MODELS = ("clip", "prior", "decoder", "upsampler_256", "upsampler_1024")
MODE_NAMES = {
    "prior": "full stack: prior’s z_i",
    "text_embedding": "z_t in place of z_i",
    "caption": "caption alone",
}
ATTRIBUTE_NAMES = {"background": "background colour", "shape_colour": "shape colour", "position": "position"}
THUMBNAIL_PIXELS = 128


def publish_report(build: Build) -> int:
    """The `report` stage."""
    page = render(build.folder, build.config)
    with build.workshop.attempt(0) as attempt:
        attempt.path("report.html").write_text(page, encoding="utf-8")
        attempt.commit(rows=1, counts={"pages": 1}, stats={})
    return 1


def write_report(folder: Folder, out: Path | None) -> str:
    """`unclip report`: the published page where it is there, or a page drawn now. → where it lies."""
    published = published_file(folder / "report", "report.html")
    if out is None and published is not None:
        return published
    config = parse_config(stored_config(folder), f"{folder.uri}/run.json")
    page = render(folder, config)
    if out is None:
        folder.write("report/draft.html", page.encode())
        return f"{folder.uri}/report/draft.html"
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {str(out)!r} cannot be written: {error.strerror}.") from error
    return str(out)


def render(folder: Folder, config: RunConfig) -> str:
    """The page for the run at `folder`, from whatever it has published."""
    there = _published(folder, config)
    took = timings(folder)
    environment_ = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline", "templates"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    scores = _scores(there)
    return environment_.get_template("report.html").render(
        title=config.report.title or f"unclip run {folder.name}",
        uri=folder.uri,
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        grid=_data_uri(there["samples"].file("grid.png").read_bytes(), "png") if "samples" in there else None,
        modes=MODE_NAMES,
        attributes=ATTRIBUTE_NAMES,
        oracle=scores.get("oracle"),
        probe=scores.get("probe"),
        retrieval=scores.get("retrieval"),
        funnel=_funnel(there),
        throughput=_throughput(took),
        pca=_pca(there),
        curves=_curves(there),
        duplicates=_duplicates(there, config),
        seen=_seen(there, config),
        view=_view(there),
        versions=environment(),
        identities=[
            {
                "name": name,
                "identity": artifact.manifest.identity_digest,
                "content": artifact.content_digest,
                "shards": artifact.shard_count,
                "rows": artifact.rows,
                "revision": artifact.manifest.revision,
            }
            for name, artifact in there.items()
        ],
        config=json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False),
    )


def _published(folder: Folder, config: RunConfig) -> dict[str, Artifact]:
    names = ["pairs", "images", "clip", "embeddings"]
    for item in config.evaluation_sets:
        names += [f"evaluation/{item.name}/{kind}" for kind in ("pairs", "images", "embeddings")]
    names += ["dedup", "view", "pca", *MODELS[1:], "samples"]
    found = {}
    for name in names:
        manifest = read_manifest(folder / name)
        if manifest is not None:
            found[name] = Artifact(folder / name, manifest)
    return found


def _scores(there: dict[str, Artifact]) -> Plain:
    if "samples" not in there:
        return {}
    scores: Plain = json.loads(there["samples"].file("scores.json").read_bytes())
    return scores


def _funnel(there: dict[str, Artifact]) -> Plain | None:
    if "images" not in there:
        return None
    images = there["images"]
    reasons: Counter[tuple[str, str]] = Counter()
    for entry in images.shards:
        table = pq.read_table(images.file(f"{entry.shard:08d}.parquet"), columns=["status", "reason"])
        counted = table.group_by(["status", "reason"]).aggregate([([], "count_all")]).to_pylist()
        for row in counted:
            reasons[row["status"], row["reason"] or ""] += row["count_all"]
    total = sum(reasons.values())
    rows = [
        {"status": status, "reason": reason, "count": count, "share": count / total}
        for (status, reason), count in sorted(reasons.items(), key=lambda item: -item[1])
    ]
    return {"total": total, "ok": images.manifest.totals["counts"].get("ok", 0), "rows": rows}


def _throughput(took: dict[str, Plain]) -> list[Plain]:
    slowest = max((entry["seconds"] for entry in took.values()), default=1.0)
    return [
        {
            "name": name,
            "seconds": entry["seconds"],
            "share": entry["seconds"] / slowest,
            "done": entry["done"],
            "rate": entry["rate"],
            "unit": entry["unit"],
        }
        for name, entry in took.items()
    ]


def _pca(there: dict[str, Artifact]) -> Plain | None:
    if "pca" not in there:
        return None
    statistics = json.loads(there["pca"].file("statistics.json").read_bytes())
    table = pq.read_table(there["pca"].file("components.parquet"), columns=["eigenvalue", "explained_share"])
    return {
        "plot": plots.spectrum(table["eigenvalue"].to_pylist(), statistics["kept"]),
        "kept": statistics["kept"],
        "dimension": statistics["dimension"],
        "kept_share": statistics["kept_share"],
        "rows": statistics["count"],
        "scale": statistics["scale"],
    }


def _curves(there: dict[str, Artifact]) -> list[Plain]:
    curves = []
    for name in MODELS:
        if name not in there or not there[name].has("history.parquet"):
            continue
        table = pq.read_table(there[name].file("history.parquet"))
        steps, losses = table["step"].to_pylist(), table["loss"].to_pylist()
        tail = losses[-max(1, len(losses) // 20) :]
        curves.append(
            {"name": name, "plot": plots.loss_curve(steps, losses), "steps": len(steps), "last": sum(tail) / len(tail)}
        )
    return curves


def _duplicates(there: dict[str, Artifact], config: RunConfig) -> Plain | None:
    """Per evaluation set: the overlap, and pairs of pictures around and above the threshold."""
    if "dedup" not in there:
        return None
    contamination = json.loads(there["dedup"].file("contamination.json").read_bytes())
    matches = pq.read_table(there["dedup"].file("matches.parquet"))
    sets = []
    for entry in contamination["evaluation_sets"]:
        of_set = matches.filter(pc.equal(matches["evaluation_set"], entry["name"]))
        rows = sorted(of_set.to_pylist(), key=lambda row: (-row["score"], row["pair_id"], row["evaluation_key"]))
        shown = _spread(rows, config.report.duplicate_examples)
        set_images = there[f"evaluation/{entry['name']}/images"]
        training = _thumbnails(there["images"], {row["pair_id"] for row in shown}, lambda row: row.pair_id)
        evaluation = _thumbnails(set_images, {row["evaluation_key"] for row in shown}, lambda row: row.url)
        pictures = [
            {
                "score": row["score"],
                "training": training[row["pair_id"]][0],
                "evaluation": evaluation[row["evaluation_key"]][0],
                "caption": training[row["pair_id"]][1],
            }
            for row in shown
        ]
        sets.append(entry | {"pictures": pictures})
    return {"sets": sets, "features": contamination["features"]}


def _spread(rows: list[Plain], count: int) -> list[Plain]:
    """At most `count` rows, evenly from the best score to the one nearest the threshold."""
    if len(rows) <= count or count == 0:
        return rows[:count]
    return [rows[index * (len(rows) - 1) // max(1, count - 1)] for index in range(count)]


def _seen(there: dict[str, Artifact], config: RunConfig) -> Plain | None:
    """What CLIP was trained on, when it was trained here: it comes before the overlap is known."""
    if "clip" not in there or not there["clip"].has("seen.json"):
        return None
    seen: Plain = json.loads(there["clip"].file("seen.json").read_bytes())
    overlap = []
    if "dedup" in there:
        contamination = json.loads(there["dedup"].file("contamination.json").read_bytes())
        overlap = contamination["evaluation_sets"]
    return seen | {"overlap": overlap}


def _view(there: dict[str, Artifact]) -> list[Plain] | None:
    if "view" not in there:
        return None
    counts: Counter[tuple[str, str]] = Counter()
    view = there["view"]
    for entry in view.shards:
        table = pq.read_table(view.file(f"{entry.shard:08d}.parquet"), columns=["included", "reason", "split"])
        for row in table.to_pylist():
            counts[row["split"], "in" if row["included"] else row["reason"]] += 1
    return [{"split": split, "why": why, "count": count} for (split, why), count in sorted(counts.items())]


def _thumbnails(images: Artifact, wanted: set[Any], key_of: Callable[[StoredRow], Any]) -> dict[Any, tuple[str, str]]:
    """Small inline pictures, with their captions, of the rows whose key is wanted."""
    found = {}
    for entry in images.shards if wanted else []:
        rows = [row for row in stored_rows(images, entry.shard) if key_of(row) in wanted]
        if not rows:
            continue
        with open_pictures(images, entry.shard) as pictures:
            for row in rows:
                picture = pictures.read(row)
                picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
                buffer = io.BytesIO()
                picture.convert("RGB").save(buffer, "JPEG", quality=88)
                found[key_of(row)] = (_data_uri(buffer.getvalue(), "jpeg"), row.text)
    return found


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
