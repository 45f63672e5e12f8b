"""The command `unclip`. Heavy imports wait inside the commands, so that `--help` answers at once.

Text and progress go to stderr, a command's result to stdout; `--json` prints one document there.
Exit codes: 0 done, 1 the work failed or found something wrong, 2 the request was wrong.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline import cli_data

app = typer.Typer(
    name="unclip",
    help="From captioned image URLs to trained unCLIP (DALL·E 2) models, and pictures out of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Recipe = Annotated[str, typer.Argument(help="A recipe that comes with unclip (demo, tiny, dalle2), or a YAML file.")]
RunUri = Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run.")]
SetValues = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe's value: --set images.size=64")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


@app.command()
def run(
    recipe: Recipe,
    out: Annotated[str | None, typer.Option(help="Folder of the run, any fsspec URI.  [default: runs/RECIPE]")] = None,
    set_: SetValues = [],  # noqa: B006
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Build this stage and what it needs.")] = None,
    rebuild: Annotated[
        str | None,
        typer.Option(
            metavar="STAGE",
            help="Build this stage again beside what is there, swap, and let what follows from it follow.",
        ),
    ] = None,
    retry: Annotated[
        str | None,
        typer.Option(metavar="STATUS,…", help="Go back to the rows that ended so: --retry fetch_failed,undecodable"),
    ] = None,
    accept: Annotated[
        list[str], typer.Option(metavar="SHARD,…", help="Publish these held shards of images as they are.")
    ] = [],  # noqa: B006
    grow: Annotated[bool, typer.Option("--grow", help="Append what is new in the source as it is now.")] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="With --grow: remove the pairs that the source does not have any more.")
    ] = False,
    allow_mixed: Annotated[
        bool, typer.Option("--allow-mixed", help="Continue an unfinished stage under other library versions.")
    ] = False,
) -> None:
    """Do what is missing, from pairs to pictures. Safe to repeat, safe to kill."""
    from cluster.storage import Folder
    from pipeline.config import load_recipe, recipe_title
    from pipeline.drive import drive, wishes_of

    config = load_recipe(recipe, set_)
    folder = Folder(out or f"runs/{recipe_title(recipe)}")
    wishes = wishes_of(rebuild=rebuild, retry=retry, accept=accept, grow=grow, prune=prune, allow_mixed=allow_mixed)
    drive(config, folder, wishes, until=until)


@app.command()
def plan(recipe: Recipe, set_: SetValues = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Say what a recipe would build: stages, models and their sizes. Needs no source."""
    from pipeline.config import load_recipe
    from pipeline.plan import plan_of, print_plan

    planned = plan_of(load_recipe(recipe, set_))
    _print_json(planned) if as_json else print_plan(planned)


@app.command()
def status(run: RunUri, as_json: AsJson = False) -> None:
    """Say how far a run is: stages, rows by outcome, what fails. Exit code 1 if something is held back or broken."""
    from cluster.storage import Folder
    from pipeline.status import status_of
    from pipeline.status_page import print_status

    found = status_of(Folder(run))
    _print_json(found) if as_json else print_status(found)
    if found["held"] or found["broken"]:
        raise typer.Exit(1)


@app.command()
def verify(
    target: Annotated[str, typer.Argument(metavar="ARTIFACT|RUN", help="A run, or one of its artifacts.")],
    sample: Annotated[
        str, typer.Option(help="Rows of each embeddings artifact to encode again: a number, or all.")
    ] = "64",
    as_json: AsJson = False,
) -> None:
    """Check bytes against receipts, rows against the ledger, and a sample of embeddings against their pictures."""
    from cluster.errors import UserError
    from cluster.storage import Folder
    from pipeline.verify import print_findings, verify_uri

    if sample != "all" and not sample.isdigit():
        raise UserError(f"--sample {sample!r}: give a number of rows, or all.")
    found = verify_uri(Folder(target), None if sample == "all" else int(sample))
    _print_json(found) if as_json else print_findings(found)
    if found["findings"]:
        raise typer.Exit(1)


@app.command()
def sample(
    run: RunUri,
    captions: Annotated[list[str], typer.Argument(metavar="CAPTION…", help="One picture a caption.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")],
    seed: Annotated[int, typer.Option(min=0, help="A picture's noise depends on this and its place alone.")] = 0,
) -> None:
    """Draw pictures from captions with a run's models."""
    from cluster.storage import Folder
    from pipeline.draw import draw

    draw(Folder(run), captions, out, seed)
    print(out)


@app.command()
def report(
    run: RunUri,
    out: Annotated[Path | None, typer.Option(help="HTML to write.  [default: RUN/report/report.html]")] = None,
) -> None:
    """Draw a run's page from what it has published so far."""
    from cluster.storage import Folder
    from pipeline.report import write_report

    print(write_report(Folder(run), out))


cli_data.register(app)


def main() -> None:
    """Entry point: one line and an exit code for what a person can mend, a traceback for what is ours."""
    from cluster.errors import UnclipError

    try:
        app()
    except UnclipError as error:
        print(f"unclip: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("unclip: interrupted; the same command continues where it stopped.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
