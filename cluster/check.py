"""Is a published artifact what its manifest says? Bytes against hashes, receipts against the table, totals."""

from collections.abc import Iterator, Sequence

from cluster.artifact import Artifact, Manifest, ShardEntry
from cluster.canonical import digest, sha256_bytes, sha256_file
from cluster.errors import WorkFailed
from cluster.shards import ShardTable


def find_faults(artifact: Artifact, *, read_bytes: bool = True, only: Sequence[int] | None = None) -> Iterator[str]:
    """One sentence a fault. With `read_bytes` every data file is hashed; without, only its size is looked at.

    `only` are shards to look at, where looking at all of them would take too long.
    """
    table = artifact.manifest.shards
    try:  # read anew: an artifact that is open already remembers its table
        if sha256_bytes(artifact.folder.read(table)) != artifact.manifest.shards_sha256:
            raise WorkFailed(f"{artifact.uri}/{table} is not the table that its manifest names.")
        shards = artifact.shards
    except (WorkFailed, FileNotFoundError) as error:
        yield f"{table}: {error}"
        return
    yield from _faults_of_manifest(artifact.manifest, shards)
    for shard in range(len(shards)) if only is None else only:
        yield from _faults_of_shard(artifact, shards[shard], read_bytes)


def _faults_of_manifest(manifest: Manifest, shards: ShardTable) -> Iterator[str]:
    if digest(manifest.identity) != manifest.identity_digest:
        yield "manifest.json: the identity does not have the digest that stands beside it"
    if digest(shards.hashes) != manifest.content_digest:
        yield "manifest.json: the content digest is not that of the shards"
    rows = shards.rows
    if (len(shards), rows) != (manifest.totals["shards"], manifest.totals["rows"]):
        yield (
            f"manifest.json: totals say {manifest.totals['shards']} shards and {manifest.totals['rows']} rows; "
            f"the table has {len(shards)} and {rows}"
        )
    if shards.numbers != list(range(len(shards))):
        yield f"{manifest.shards}: shard numbers are not 0…{len(shards) - 1}"


def _faults_of_shard(artifact: Artifact, entry: ShardEntry, read_bytes: bool) -> Iterator[str]:
    try:
        artifact.receipt(entry.shard)
    except WorkFailed as error:
        yield str(error)
    for file in entry.files:
        try:
            size = artifact.folder.size(file.stored_as)
        except FileNotFoundError:
            yield f"{file.stored_as}: missing"
            continue
        if size != file.bytes:
            yield f"{file.stored_as}: {size} bytes, {file.bytes} are promised"
        elif read_bytes:
            with artifact.folder.borrowed(file.stored_as) as path:
                if sha256_file(path) != file.sha256:
                    yield f"{file.stored_as}: its bytes are not those of the receipt"
