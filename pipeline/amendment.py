"""New revisions of pairs and images without the removed rows; shards that have none of them are inherited.

A revision of images in the making (a first fetch, a `--retry`) is not lost: the shards that it has done go over into a
later one that names the new pairs, as they are or without the removed rows, and `unclip run` goes on there. Where
images are published too, three revisions meet, begun in this order, so that a kill between any two steps leaves a
state from which the same steps lead on:

    unfinished   left by the run
    amended      the published one without the removed rows; its manifest is written last
    carried      the unfinished one without the removed rows; its receipts are written before its request
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.artifact import Artifact, Receipt, Request, ShardEntry, read_manifest, read_requests, receipt_name
from cluster.canonical import canonical_json, digest
from cluster.environment import environment
from cluster.shards import ChosenShards
from cluster.storage import Folder
from cluster.workshop import Workshop, begin
from ingest.ledger import Mark
from ingest.outcome import Status
from ingest.removal import ShardFiles, Tombstones, is_made_of, write_images_without, write_pairs_without
from pipeline.held import HELD_FILE, read_held

Plain = dict[str, Any]
Fence = Callable[[], None]


def read_columns(artifact: Artifact, columns: list[str]) -> Iterator[tuple[ShardEntry, pa.Table]]:
    """Columns of every shard's table, one after another; of an object store no more than they are is read."""
    for entry in artifact.shards:
        yield entry, _columns(artifact.folder, entry, columns)


def read_begun(target: Folder, columns: list[str]) -> Iterator[pa.Table]:
    """The same of what is published and of what an unfinished revision has done so far."""
    manifest, revision = read_manifest(target), unfinished_revision(target)
    if manifest is not None:
        yield from (table for _, table in read_columns(Artifact(target, manifest), columns))
    if revision is not None:
        workshop = Workshop(target.uri, revision)
        workshop.recover()
        for shard in sorted(workshop.committed()):
            receipt = workshop.receipt(shard)
            if receipt is not None:
                yield _columns(target, receipt.entry, columns)


def amend_pairs(target: Folder, tombstones: Tombstones, *, fence: Fence) -> dict[str, int] | None:
    """Publish `pairs` without the removed rows. → rows and shards that changed; None where there was nothing to do."""
    artifact = Artifact.open(target)
    touched = _touched(artifact.folder, artifact.shards, tombstones, ("mark", Mark.REMOVED))
    if not touched:
        return None
    workshop = _workshop(artifact, artifact.manifest.inputs, tombstones)
    for shard in sorted(touched.keys() - workshop.committed()):
        entry = artifact.shards[shard]
        files = _files(target, entry, artifact.stats(shard))
        with workshop.attempt(shard) as attempt:
            write_pairs_without(files, tombstones, attempt, entry.made_from)
    workshop.publish(artifact.shard_count, fence=fence, inherit=_untouched(artifact, touched))
    return _amended(touched)


def amend_images(target: Folder, pairs: Artifact, tombstones: Tombstones, *, fence: Fence) -> dict[str, int] | None:
    """Publish `images` without the removed rows, as made from the amended pairs, and bring unfinished work along.

    → rows and shards that changed in what is published, and rows of a revision `in_the_making`; None for no change.
    """
    manifest = read_manifest(target)
    published = Artifact(target, manifest) if manifest is not None else None
    touched = _touched_images(published.folder, published.shards, tombstones) if published is not None else {}
    workshop = None
    if published is not None and touched:
        made_from = {shard: _made_from(target, published.shards[shard], pairs, tombstones) for shard in touched}
        inputs = _inputs(published, made_from, pairs)
        workshop = _workshop(published, inputs, tombstones)
        for shard in sorted(touched.keys() - workshop.committed()):
            _write(workshop, _files(target, published.shards[shard], published.stats(shard)), tombstones, made_from)
    carried = _carry(target, published, workshop, pairs, tombstones)
    if workshop is not None and published is not None:
        workshop.publish(published.shard_count, fence=fence, inherit=_untouched(published, touched))
    amended = _amended(touched)
    return amended | {"in_the_making": sum(carried.values())} if touched or carried else None


def unfinished_revision(target: Folder) -> int | None:
    """The revision of `target` that a run has begun and not published, if there is one; a takedown's does not count."""
    manifest, requests = read_manifest(target), read_requests(target)
    revision = max(requests, default=0)
    if revision and _takes_down(requests[revision]):
        revision -= 1
    unfinished = revision > (manifest.revision if manifest is not None else 0) and not _takes_down(requests[revision])
    return revision if unfinished else None


def _carry(
    target: Folder, published: Artifact | None, amended: Workshop | None, pairs: Artifact, tombstones: Tombstones
) -> dict[int, int]:
    """Bring the shards of an unfinished revision over into a new one. → rows removed from them, by shard."""
    revision = unfinished_revision(target)
    if revision is None or (amended is not None and revision > amended.revision):
        return {}  # nothing was in the making, or it has been carried over already
    old, asked = Workshop(target.uri, revision), read_requests(target)[revision]
    old.recover()
    entries = [receipt.entry for shard in sorted(old.committed()) if (receipt := old.receipt(shard)) is not None]
    touched = _touched_images(target, entries, tombstones)
    inputs = {pairs.manifest.kind: pairs.content_digest}
    if not touched and asked["identity"]["inputs"] == inputs:
        return {}
    new = Workshop(target.uri, max(read_requests(target)) + 1)
    new.recover()  # of a takedown that was killed: publishing what is amended clears the place where its files lie
    done = new.committed()
    for entry in entries:
        receipt = old.receipt(entry.shard)
        assert receipt is not None, "only this process works on the run"
        if entry.shard in done:
            continue
        if entry.shard in touched:
            made_from = {entry.shard: _made_from(target, entry, pairs, tombstones)}
            _write(new, _files(target, entry, receipt.stats), tombstones, made_from)
        elif entry.made_from == _digest_of(pairs, entry.shard):
            _adopt(new, receipt)
    amends = asked.get("amends")
    if amends is not None and "revision" in amends and amended is not None:
        amends = amends | {"revision": amended.revision}
    identity = asked["identity"]
    request = Request(identity["kind"], identity["code_version"], identity["settings"], inputs)
    begun = begin(target, request, environment(), allow_mixed=True, amends=amends)
    held = read_held(target)
    if held.get("revision") == revision:
        target.write(HELD_FILE, json.dumps(held | {"revision": begun.revision}, indent=1).encode())
    return touched


def _adopt(workshop: Workshop, receipt: Receipt) -> None:
    """Let a shard of an earlier unfinished revision be one of this: its files lie where they are."""
    workshop.folder.create(receipt_name(receipt.shard, workshop.revision), receipt.to_bytes())


def _workshop(artifact: Artifact, inputs: dict[str, str], tombstones: Tombstones) -> Workshop:
    """The takedown's revision of a published artifact: the one begun before a kill, or a new one."""
    identity, amends = artifact.manifest.identity | {"inputs": inputs}, {"takedown": tombstones.takedown}
    asked = json.loads(canonical_json(identity))
    for revision, plain in read_requests(artifact.folder).items():
        if revision > artifact.manifest.revision and plain["identity"] == asked and plain.get("amends") == amends:
            return Workshop(artifact.uri, revision)
    request = Request(identity["kind"], identity["code_version"], identity["settings"], inputs)
    return begin(artifact.folder, request, environment(), allow_mixed=True, amends=amends)


def _takes_down(request: Plain) -> bool:
    return "takedown" in (request.get("amends") or {})


def _write(workshop: Workshop, files: ShardFiles, tombstones: Tombstones, made_from: Mapping[int, str]) -> None:
    with workshop.attempt(files.shard) as attempt:
        write_images_without(files, tombstones, attempt, made_from[files.shard])


def _made_from(target: Folder, entry: ShardEntry, pairs: Artifact, tombstones: Tombstones) -> str:
    """What a shard of images is made from once the removed rows are out: the amended pairs shard, if it is the same
    rows with the same marks; else (the pairs have moved on, and this shard has not followed) what it was."""
    if entry.shard >= pairs.shard_count:
        return entry.made_from
    ledger = _columns(target, entry, ["source_file", "source_row", "pair_id", "status"])
    of_pairs = _columns(pairs.folder, pairs.shards[entry.shard], ["source_file", "source_row", "pair_id", "mark"])
    return _digest_of(pairs, entry.shard) if is_made_of(ledger, of_pairs, tombstones) else entry.made_from


def _digest_of(pairs: Artifact, shard: int) -> str:
    """As `made_from` of a shard of images names the shard of pairs."""
    return digest([pairs.shards[shard].sha256]) if shard < pairs.shard_count else ""


def _inputs(images: Artifact, made_from: Mapping[int, str], pairs: Artifact) -> dict[str, str]:
    """The amended pairs, where every shard is made from them; else the images are as stale as they were."""
    if images.shard_count == pairs.shard_count and all(
        made_from.get(entry.shard, entry.made_from) == _digest_of(pairs, entry.shard) for entry in images.shards
    ):
        return {pairs.manifest.kind: pairs.content_digest}
    return images.manifest.inputs


def _touched_images(folder: Folder, entries: Any, tombstones: Tombstones) -> dict[int, int]:
    return _touched(folder, entries, tombstones, ("status", Status.REMOVED))


def _touched(folder: Folder, entries: Any, tombstones: Tombstones, gone: tuple[str, str]) -> dict[int, int]:
    """Shard → rows that have a tombstone and are not yet marked as gone."""
    touched = {}
    for entry in entries:
        table = _columns(folder, entry, ["pair_id", gone[0]])
        still = pc.fill_null(pc.not_equal(table[gone[0]], gone[1]), True).to_numpy()
        if count := int((tombstones.rows(table["pair_id"]) & still).sum()):
            touched[entry.shard] = count
    return touched


def _columns(folder: Folder, entry: ShardEntry, columns: list[str]) -> pa.Table:
    stored_as = next(file.stored_as for file in entry.files if file.name.endswith(".parquet"))
    with folder.open(stored_as) as file:
        return pq.ParquetFile(file).read(columns, use_threads=False)


def _files(folder: Folder, entry: ShardEntry, stats: Plain) -> ShardFiles:
    paths = {file.name.rpartition(".")[2]: folder.local_path(file.stored_as) for file in entry.files}
    return ShardFiles(entry.shard, paths["parquet"], paths.get("tar"), stats)


def _amended(touched: Mapping[int, int]) -> dict[str, int]:
    return {"rows": sum(touched.values()), "shards": len(touched)}


def _untouched(artifact: Artifact, touched: Collection[int]) -> ChosenShards:
    return ChosenShards(artifact.shards, set(range(artifact.shard_count)).difference(touched))
