"""`unclip gc`: delete what no manifest of a run names: superseded revisions, and what killed attempts left.

An unfinished revision that the next run would go on with is kept. Requests stay: they are the history of the artifact.
"""

from collections.abc import Iterator
from typing import Any

from rich.console import Console

from cluster.artifact import read_requests
from cluster.errors import UserError
from cluster.garbage import collect, delete
from cluster.lease import Lease, driver_of
from cluster.storage import Folder
from pipeline.runner import stored_config
from pipeline.words import bytes_in_words

Plain = dict[str, Any]


def collect_garbage(folder: Folder, *, dry_run: bool = False) -> Plain:
    """{"run", "dry_run", "artifacts": {name: {"files", "bytes"}}, "files", "bytes"}. Raises `LeaseHeld` where a driver
    is at work: what it has staged is named by nothing yet."""
    stored_config(folder)
    names = artifact_folders(folder)
    if not names:
        raise UserError(f"{folder.uri} has no artifacts: nothing was ever begun there.")
    if dry_run:
        at_work = driver_of(folder) is not None
        found = {name: unnamed(folder / name, at_work=at_work)[1] for name in names}
    else:
        with Lease(folder):
            found = delete_unnamed(folder, names)
    found = {name: counted for name, counted in found.items() if counted["files"]}
    totals = {key: sum(counted[key] for counted in found.values()) for key in ("files", "bytes")}
    return {"run": folder.uri, "dry_run": dry_run, "artifacts": found} | totals


def artifact_folders(folder: Folder) -> list[str]:
    """Every folder of the run that an artifact was begun in, whatever its recipe names now."""
    sets = [f"evaluation/{name}" for name in (folder / "evaluation").names()]
    names = [*folder.names(), *(f"{name}/{inner}" for name in sets for inner in (folder / name).names())]
    return [name for name in names if read_requests(folder / name)]


def delete_unnamed(folder: Folder, names: list[str]) -> dict[str, Plain]:
    """Delete what no manifest names in these artifacts. → files and bytes by artifact. The lease must be held."""
    deleted = {}
    for name in names:
        found, deleted[name] = unnamed(folder / name)
        delete(folder / name, found)
    return deleted


def unnamed(target: Folder, *, at_work: bool = False) -> tuple[list[str], Plain]:
    """What of an artifact's folder no manifest names (files and folders), and how many files and bytes that is.

    `at_work`: a driver may be writing just now; what may be of its making is not counted.
    """
    found = collect(target, at_work=at_work)
    parents = {name.rpartition("/")[0] for name in found}
    folders = {f"{parent}/{name}" if parent else name for parent in parents for name in _at(target, parent).folders()}
    sizes = [size for name in found for size in _sizes(target, name, is_folder=name in folders)]
    return found, {"files": len(sizes), "bytes": sum(sizes)}


def _sizes(target: Folder, name: str, *, is_folder: bool) -> Iterator[int]:
    """Of a file, or of every file in a folder."""
    if not is_folder:
        yield target.size(name)
        return
    folders = set((target / name).folders())
    for inner in (target / name).names():
        yield from _sizes(target, f"{name}/{inner}", is_folder=inner in folders)


def _at(target: Folder, parent: str) -> Folder:
    return target / parent if parent else target


def print_garbage(found: Plain) -> None:
    console = Console(highlight=False)
    for name, counted in found["artifacts"].items():
        console.print(f"{name}: {counted['files']:,} files, {bytes_in_words(counted['bytes'])}", soft_wrap=True)
    verb = "would be deleted" if found["dry_run"] else "deleted"
    if found["files"]:
        console.print(f"{found['files']:,} files, {bytes_in_words(found['bytes'])} {verb}.")
    else:
        console.print(f"{found['run']}: nothing to delete, every file is named by a manifest.", soft_wrap=True)
