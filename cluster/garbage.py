"""What lies in an artifact's folder and is named by nothing that counts: superseded files, traces of kills.

What counts: the manifest, the table of shards that it names with its data files and their receipts, every request
(they are the history), and all of the newest revision where it is not published yet: a run may go on with it.
"""

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from cluster.artifact import Artifact, read_manifest, read_requests, receipt_name, revised, revisions_of
from cluster.shards import ShardEntry
from cluster.storage import Folder
from cluster.workshop import READERS, STAGING, Workshop

DELETERS = 16
NOTES = {"manifest.json", "held.json"}
REVISED = re.compile(r"(?P<stem>.*?)-r(?P<revision>[0-9]+)(?=\.|$)")


def collect(folder: Folder, *, at_work: bool = False) -> list[str]:
    """Names, relative to the artifact's `folder`, of files and folders that nothing needs; deletes nothing.

    Folders that are not of the protocol are left alone: other artifacts may live there (`evaluation/<name>/images`).

    `at_work`: a driver holds the lease of the run (`cluster.lease.driver_of`). Then what its workers may be writing
    just now stays too. Without one, attempts that never claimed their shard are left-overs.
    """
    manifest, newest = read_manifest(folder), max(read_requests(folder), default=0)
    if manifest is None and newest == 0:
        return []  # no artifact: whose files these are, nobody here knows
    published = manifest.revision if manifest is not None else 0
    open_revision = newest if at_work or newest > published else 0
    keep = NOTES | {revised("request.json", revision) for revision in range(1, newest + 1)}
    receipts: set[str] = set()
    if manifest is not None:
        keep |= {manifest.shards, "work" if published == 1 else f"work-r{published}"}
        for entry in Artifact(folder, manifest).shards:
            keep.update(file.stored_as for file in entry.files)
            receipts.update(receipt_name(entry.shard, revision) for revision in revisions_of(entry, published))
    for entry in _made(folder, open_revision):  # a shard of it may be one that an earlier unfinished revision made
        keep.update(file.stored_as for file in entry.files)
        receipts.update(receipt_name(entry.shard, revision) for revision in revisions_of(entry, open_revision))
    foreign = {name for name in folder.folders() if REVISED.sub(r"\g<stem>", name) != "work"}
    found = []
    for name in folder.names():
        if name == "receipts":
            inside = [f"receipts/{receipt}" for receipt in (folder / "receipts").names()]
            found += [name for name in inside if name not in receipts and not _is_open(name, open_revision, at_work)]
        elif name == STAGING:
            found += [] if at_work else _unclaimed(folder, open_revision)
        elif name not in keep and name not in foreign and not _is_open(name, open_revision, at_work):
            found.append(name)
    return found


def delete(folder: Folder, names: Iterable[str]) -> None:
    """Delete what `collect` found. Killed in the middle, the next `collect` finds the rest."""
    with ThreadPoolExecutor(DELETERS, thread_name_prefix="delete") as deleters:
        for _ in deleters.map(folder.delete, names):
            pass


def _made(folder: Folder, revision: int) -> Iterator[ShardEntry]:
    """What the receipts of an unfinished revision prove."""
    workshop = Workshop(folder.uri, revision)
    with ThreadPoolExecutor(READERS, thread_name_prefix="receipts") as readers:
        receipts = readers.map(workshop.receipt, sorted(workshop.committed()) if revision else ())
        yield from (receipt.entry for receipt in receipts if receipt is not None)


def _is_open(name: str, open_revision: int, at_work: bool) -> bool:
    """Does `name` belong to the revision that a run may go on with? Private names live as long as their writer."""
    base = name.rpartition("/")[2]
    if base.startswith("."):
        return at_work
    if base.endswith(".discarded"):
        return False
    match = REVISED.match(base)
    return open_revision > 0 and (int(match["revision"]) if match else 1) == open_revision


def _unclaimed(folder: Folder, open_revision: int) -> list[str]:
    """Attempts in `.staging/` that no receipt of the open revision names: they can never become a shard's."""
    if not open_revision:
        return [STAGING]
    attempts = []
    for name in (folder / STAGING).names():
        shard, _, attempt = name.partition("-")
        receipt = Workshop(folder.uri, open_revision).receipt(int(shard)) if shard.isdigit() else None
        if receipt is None or receipt.attempt != attempt:
            attempts.append(f"{STAGING}/{name}")
    return attempts
