"""`unclip diff A B`: what happened to the rows between two images artifacts, or between those of two runs."""

from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.artifact import Artifact, differences, read_manifest
from cluster.errors import UserError
from cluster.storage import Folder
from ingest.diff import diff_images

Plain = dict[str, Any]
KINDS = {
    "only_a": "only in A",
    "only_b": "only in B",
    "status": "ended in another state",
    "reason": "ended so for another reason",
    "removed": "removed in B",
    "fetched_picture": "fetched other bytes",
    "stored_picture": "stored other bytes",
    "caption": "URLs with other captions",
    "text": "URL or caption changed under the same pair id: damage, run `unclip verify`",
    "key": "moved to another place",
}


def diff_uris(a: Folder, b: Folder) -> Plain:
    """{"a", "b", "equal", "settings", "rows", "statuses", "reasons", "changed", "examples"}. Equal means: the bytes."""
    left, right = _images(a), _images(b)
    plain: Plain = {"a": _about(left), "b": _about(right), "equal": left.content_digest == right.content_digest}
    of_a, of_b = ({**side.manifest.identity, "inputs": None} for side in (left, right))
    plain["settings"] = differences(of_a, of_b, "")
    return plain | diff_images(left, right).plain()


def print_diff(found: Plain) -> None:
    console = Console(highlight=False)
    for side in ("a", "b"):
        about = found[side]
        console.print(
            f"{side.upper()}  {about['uri']}  revision {about['revision']}, {about['shards']:,} shards, "
            f"{about['rows']:,} rows, {about['content_digest'][:12]}",
            soft_wrap=True,
        )
    if found["equal"]:
        console.print("equal, byte for byte.")
        return
    for line in found["settings"]:
        console.print(f"  {line}", soft_wrap=True, markup=False)
    rows = found["rows"]
    console.print(f"{rows['both']:,} rows in both, {rows['only_a']:,} only in A, {rows['only_b']:,} only in B")
    moved = [entry for entry in found["statuses"] if entry["a"] != entry["b"]]
    _print_table(console, ("state in A", "state in B", "rows"), moved)
    _print_table(console, ("reason in A", "reason in B", "rows"), found["reasons"])
    for kind, label in KINDS.items():
        count = found["changed"].get(kind, rows.get(kind, 0))
        if count:
            console.print(f"{count:,} {label}")
        for example in found["examples"].get(kind, []):
            console.print(
                "    " + "  ".join(f"{k} {_shown(v)}" for k, v in example.items()), soft_wrap=True, markup=False
            )
    if not (moved or found["changed"] or rows["only_a"] or rows["only_b"]):
        console.print("Every row ended the same way, with the same picture; the files differ in their bytes.")


def _images(target: Folder) -> Artifact:
    for folder in (target, target / "images"):
        manifest = read_manifest(folder)
        if manifest is not None and manifest.kind.endswith("images"):
            return Artifact(folder, manifest)
        if manifest is not None:
            raise UserError(f"{folder.uri} is {manifest.kind}; diff compares images artifacts, or runs that have one.")
    raise UserError(f"{target.uri} is neither an images artifact nor a run with published images.")


def _about(artifact: Artifact) -> Plain:
    return {
        "uri": artifact.uri,
        "revision": artifact.manifest.revision,
        "shards": artifact.shard_count,
        "rows": artifact.rows,
        "content_digest": artifact.content_digest,
    }


def _print_table(console: Console, titles: tuple[str, str, str], entries: list[Plain]) -> None:
    if not entries:
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title, justify in zip(titles, ("left", "left", "right"), strict=True):
        table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for entry in sorted(entries, key=lambda entry: -entry["rows"]):
        table.add_row(entry["a"], entry["b"], f"{entry['rows']:,}")
    console.print(table)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " → ".join(map(_shown, value))
    text = "null" if value is None else str(value)
    return text if len(text) <= 100 else f"{text[:99]}…"
