"""An artifact under construction: shards are staged, claimed and settled, and the manifest is written last.

`cluster.artifact` has the protocol and says why it is so. Workers hold an `Attempt` for a while; the driver holds the
`Workshop`, whose plain form travels to them.
"""

import json
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from cluster.artifact import (
    SCHEMA_VERSION,
    Artifact,
    FileEntry,
    Manifest,
    Receipt,
    Request,
    differences,
    read_manifest,
    read_requests,
    receipt_name,
    revised,
)
from cluster.canonical import canonical_json, digest, sha256_bytes, sha256_file
from cluster.environment import environment_digest
from cluster.errors import UserError, WorkFailed
from cluster.shards import ShardEntry, ShardTable
from cluster.storage import Folder, told_when_full

STAGING = ".staging"
READERS = 32  # receipts read at once: an object store answers each in tens of milliseconds
BATCH_SHARDS = 4096
NOTHING: Mapping[int, ShardEntry] = {}


class Workshop:
    """An artifact under construction. Plain and picklable: workers commit shards to it, the driver publishes it."""

    def __init__(self, uri: str, revision: int) -> None:
        self.folder = Folder(uri)
        self.revision = revision

    def __reduce__(self) -> tuple[type["Workshop"], tuple[str, int]]:
        return Workshop, (self.folder.uri, self.revision)

    def plain(self) -> dict[str, Any]:
        return {"uri": self.folder.uri, "revision": self.revision}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        return cls(plain["uri"], plain["revision"])

    @property
    def work(self) -> Folder:
        """Scratch for checkpoints and logs of this revision: no content, and no reader looks here."""
        return self.folder / ("work" if self.revision == 1 else f"work-r{self.revision}")

    @property
    def request(self) -> Request:
        plain = json.loads(self.folder.read(revised("request.json", self.revision)))["identity"]
        return Request(plain["kind"], plain["code_version"], plain["settings"], plain["inputs"])

    def attempt(self, shard: int) -> "Attempt":
        return Attempt(self, shard)

    def receipt(self, shard: int) -> Receipt | None:
        try:
            return Receipt.from_bytes(self.folder.read(receipt_name(shard, self.revision)))
        except FileNotFoundError:
            return None

    def committed(self) -> set[int]:
        """Shards of this revision that have a receipt."""
        suffix = revised(".json", self.revision)
        names = (name for name in (self.folder / "receipts").names() if name.endswith(suffix))
        return {int(stem) for name in names if (stem := name.removesuffix(suffix)).isdigit()}

    def recover(self) -> None:
        """Finish the move of every shard that was claimed by an attempt which did not live to settle it."""
        for name in sorted({path.partition("/")[0] for path in (self.folder / STAGING).files_below()}):
            shard, _, attempt = name.partition("-")
            receipt = self.receipt(int(shard)) if shard.isdigit() else None
            if receipt is not None and receipt.attempt == attempt:
                self._settle(receipt)

    def discard(self, shard: int) -> None:
        """Set a shard's receipt aside, so that the shard is made again. Where it has none, nothing is to be done.

        Its files are settled first: then the attempt that made them has nothing left that it could still move over
        the files of its successor. They stay at their public names, which the successor's take.
        """
        receipt = self.receipt(shard)
        if receipt is not None:
            self._settle(receipt)
            name = receipt_name(shard, self.revision)
            self.folder.settle(name, f"{name}.{receipt.attempt}.discarded")

    def _settle(self, receipt: Receipt) -> None:
        staged = f"{STAGING}/{receipt.shard:08d}-{receipt.attempt}"
        for entry in receipt.files:
            self.folder.settle(f"{staged}/{entry.stored_as}", entry.stored_as)
        self.folder.delete(staged)

    def publish(
        self,
        shard_count: int,
        *,
        fence: Callable[[], None] = lambda: None,
        inherit: Mapping[int, ShardEntry] = NOTHING,
    ) -> Artifact:
        """Write `shards.parquet` and, last, the manifest. Their bytes depend on the receipts' content only.

        `inherit` are shards that the published revision has and this one takes over as they are: its entries of them.
        `fence` is called just before the manifest is replaced; it raises where another driver has taken over.
        """
        missing = sorted(set(range(shard_count)) - inherit.keys() - self.committed())
        if missing:
            raise WorkFailed(f"{self.folder.uri} cannot be published: no receipt of shards {missing[:8]}.")
        self.recover()
        table = ShardTable.from_entries(self._entries(shard_count, inherit))
        manifest, shards = _roll_up(self.request, self.revision, table)
        self.folder.write(manifest.shards, shards)
        fence()
        self.folder.write("manifest.json", manifest.to_bytes())
        self.folder.delete(STAGING)
        return Artifact(self.folder, manifest)

    def _entries(self, shard_count: int, inherit: Mapping[int, ShardEntry]) -> Iterator[list[ShardEntry]]:
        with ThreadPoolExecutor(READERS, thread_name_prefix="receipts") as readers:
            for start in range(0, shard_count, BATCH_SHARDS):
                shards = range(start, min(start + BATCH_SHARDS, shard_count))
                made = readers.map(self._entry, [shard for shard in shards if shard not in inherit])
                yield [inherit[shard] if shard in inherit else next(made) for shard in shards]

    def _entry(self, shard: int) -> ShardEntry:
        receipt = self.receipt(shard)
        if receipt is None:
            raise WorkFailed(f"{self.folder.uri} cannot be published: the receipt of shard {shard} has gone.")
        return receipt.entry


class Attempt:
    """One try at a shard: a private place for its files, and the commit that makes them the shard's."""

    def __init__(self, workshop: Workshop, shard: int) -> None:
        self._workshop = workshop
        self._shard = shard
        self._attempt = uuid.uuid4().hex[:16]
        self._staged = f"{STAGING}/{shard:08d}-{self._attempt}"
        self._names: list[str] = []
        self._ours = True
        folder = workshop.folder
        with told_when_full(folder.uri):
            if folder.local:
                self._private = Path(folder.uri) / self._staged
                self._private.mkdir(parents=True)
            else:
                self._private = Path(tempfile.mkdtemp(prefix="unclip-attempt-"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self._ours:
            shutil.rmtree(self._private, ignore_errors=True)
        if isinstance(error, OSError):
            with told_when_full(str(self._private)):
                raise error

    def path(self, name: str) -> Path:
        """A private local path to write the file of that logical name to."""
        if name not in self._names:
            self._names.append(name)
        return self._private / revised(name, self._workshop.revision)

    def commit(
        self, *, rows: int, counts: dict[str, int], stats: dict[str, Any] | None = None, made_from: str = ""
    ) -> Receipt:
        """Flush, claim, settle. Returns the shard's receipt: another attempt's where that one was first.

        `made_from` is the digest of the input shards; a shard whose inputs are the same need not be made again.
        """
        folder, revision = self._workshop.folder, self._workshop.revision
        entries = []
        for name in sorted(self._names):
            path, stored_as = self.path(name), revised(name, revision)
            entries.append(FileEntry(name, stored_as, sha256_file(path), path.stat().st_size))
            folder.upload(path, f"{self._staged}/{stored_as}")
        receipt = Receipt(
            shard=self._shard,
            files=tuple(entries),
            rows=rows,
            counts=dict(sorted(counts.items())),
            made_from=made_from,
            stats=stats or {},
            attempt=self._attempt,
            host=socket.gethostname(),
            environment=environment_digest(),
        )
        # From here on a receipt may name these files, also where an error (a full disk) ends the attempt before they
        # are settled: `recover` will want them.
        self._ours = not folder.local
        while not folder.create(receipt_name(self._shard, revision), receipt.to_bytes()):
            winner = self._workshop.receipt(self._shard)
            if winner is not None:  # it may have been discarded since: then the claim is free again
                folder.delete(self._staged)
                return winner
        self._workshop._settle(receipt)
        return receipt


def begin(
    folder: Folder,
    request: Request,
    environment: dict[str, str],
    *,
    allow_mixed: bool = False,
    amends: dict[str, Any] | None = None,
) -> Workshop:
    """Open the workshop for `request`: the one left by an earlier run of the same identity, or a new revision.

    `amends` is plain data that says how the new revision changes the published one; an unfinished revision is gone on
    with only where it was begun for the same change.

    Raises `UserError` where the one left was begun under other library versions, since its shards might differ in
    their bytes; `allow_mixed` continues all the same (receipts record each shard's environment).
    """
    folder.make()
    manifest = read_manifest(folder)
    published = manifest.revision if manifest else 0
    requests = read_requests(folder)
    newest = max(requests, default=0)
    asked = json.loads(canonical_json({"identity": request.identity, "amends": amends}))
    left = {"identity": requests[newest]["identity"], "amends": requests[newest].get("amends")} if newest else None
    if newest > published and left == asked:
        then = requests[newest]["environment"]
        if then != environment and not allow_mixed:
            changed = ", ".join(differences(then, environment, "")[:5])
            raise UserError(
                f"{folder.uri} was begun under other library versions ({changed}). Restore them, continue with "
                f"--allow-mixed, or start elsewhere with another --out."
            )
        return Workshop(folder.uri, newest)
    revision = max(newest, published) + 1
    body = json.dumps(asked | {"environment": environment}, indent=1, sort_keys=True).encode()
    if not folder.create(revised("request.json", revision), body):
        raise UserError(f"another driver has just begun revision {revision} of {folder.uri}.")
    return Workshop(folder.uri, revision)


def _roll_up(request: Request, revision: int, table: ShardTable) -> tuple[Manifest, bytes]:
    with told_when_full(tempfile.gettempdir()), tempfile.TemporaryDirectory(prefix="unclip-") as scratch:
        table.write(path := Path(scratch) / "shards.parquet")
        shards = path.read_bytes()
    manifest = Manifest(
        kind=request.kind,
        schema_version=SCHEMA_VERSION,
        revision=revision,
        identity=request.identity,
        identity_digest=digest(request.identity),
        content_digest=digest(table.hashes),
        inputs=request.inputs,
        totals={"shards": len(table), "rows": table.rows, "counts": table.counts},
        shards=revised("shards.parquet", revision),
        shards_sha256=sha256_bytes(shards),
    )
    return manifest, shards
