"""Is a published artifact what its manifest says? Bytes against hashes, receipts against the table, totals."""

from collections.abc import Iterator

from cluster.artifact import Artifact, Manifest, ShardEntry
from cluster.canonical import digest, sha256_file
from cluster.errors import WorkFailed


def find_faults(artifact: Artifact, *, read_bytes: bool = True) -> Iterator[str]:
    """One sentence a fault. With `read_bytes` every data file is hashed; without, only its size is looked at."""
    try:
        shards = artifact.shards
    except (WorkFailed, FileNotFoundError) as error:
        yield f"{artifact.manifest.shards}: {error}"
        return
    yield from _faults_of_manifest(artifact.manifest, shards)
    for entry in shards:
        yield from _faults_of_shard(artifact, entry, read_bytes)


def _faults_of_manifest(manifest: Manifest, shards: list[ShardEntry]) -> Iterator[str]:
    if digest(manifest.identity) != manifest.identity_digest:
        yield "manifest.json: the identity does not have the digest that stands beside it"
    if digest([entry.sha256 for entry in shards]) != manifest.content_digest:
        yield "manifest.json: the content digest is not that of the shards"
    rows = sum(entry.rows for entry in shards)
    if (len(shards), rows) != (manifest.totals["shards"], manifest.totals["rows"]):
        yield (
            f"manifest.json: totals say {manifest.totals['shards']} shards and {manifest.totals['rows']} rows; "
            f"the table has {len(shards)} and {rows}"
        )
    if [entry.shard for entry in shards] != list(range(len(shards))):
        yield f"{manifest.shards}: shard numbers are not 0…{len(shards) - 1}"


def _faults_of_shard(artifact: Artifact, entry: ShardEntry, read_bytes: bool) -> Iterator[str]:
    try:
        receipt = artifact.receipt(entry.shard)
    except WorkFailed:
        yield f"shard {entry.shard}: its receipt is missing"
    else:
        if (receipt.files, receipt.rows, receipt.counts) != (entry.files, entry.rows, entry.counts):
            yield f"shard {entry.shard}: receipt and {artifact.manifest.shards} disagree"
    for file in entry.files:
        try:
            size = artifact.folder.size(file.stored_as)
        except FileNotFoundError:
            yield f"{file.stored_as}: missing"
            continue
        if size != file.bytes:
            yield f"{file.stored_as}: {size} bytes, {file.bytes} are promised"
        elif read_bytes and sha256_file(artifact.folder.local_path(file.stored_as)) != file.sha256:
            yield f"{file.stored_as}: its bytes are not those of the receipt"
