"""Commands of `unclip` for the data of a run that is there: takedown, diff, gc."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

RunUri = Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def register(app: typer.Typer) -> None:
    app.command()(takedown)
    app.command()(diff)
    app.command()(gc)


def takedown(
    run: RunUri,
    urls: Annotated[Path | None, typer.Option(metavar="FILE", help="URLs, one a line.")] = None,
    domains: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Domains, one a line; what lies below them is meant too.")
    ] = None,
    image_hashes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="SHA-256 of pictures, as fetched or as stored, one a line.")
    ] = None,
    pairs: Annotated[Path | None, typer.Option(metavar="FILE", help="Pair ids in hexadecimal, one a line.")] = None,
    purge: Annotated[
        bool, typer.Option("--purge", help="Delete superseded files of pairs and images at once, as gc would.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove rows from a run for good: url, caption, hashes and picture. What rests on them follows on the next run."""
    from cluster.errors import UserError
    from cluster.storage import Folder
    from ingest.removal_lists import ListKind
    from pipeline.takedown import take_down
    from pipeline.takedown_page import print_takedown

    lists: dict[ListKind, Path | None] = {
        "urls": urls,
        "domains": domains,
        "image_hashes": image_hashes,
        "pairs": pairs,
    }
    given = [(kind, path) for kind, path in lists.items() if path is not None]
    if len(given) != 1:
        raise UserError("takedown takes one list: --urls, --domains, --image-hashes or --pairs, and a file.")
    kind, path = given[0]
    taken = take_down(Folder(run), kind, path, purge=purge)
    _print_json(taken) if as_json else print_takedown(taken)


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="An images artifact, or a run.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The one to compare it with.")],
    as_json: AsJson = False,
) -> None:
    """Say what differs between two images artifacts, row by row. Exit code 1 if anything does."""
    from cluster.storage import Folder
    from pipeline.diff import diff_uris, print_diff

    found = diff_uris(Folder(a), Folder(b))
    _print_json(found) if as_json else print_diff(found)
    if not found["equal"]:
        raise typer.Exit(1)


def gc(
    run: RunUri,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted, and delete nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete what no manifest of a run names any more: superseded revisions, leftovers of killed attempts."""
    from cluster.storage import Folder
    from pipeline.gc import collect_garbage, print_garbage

    found = collect_garbage(Folder(run), dry_run=dry_run)
    _print_json(found) if as_json else print_garbage(found)


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=1, ensure_ascii=False))
