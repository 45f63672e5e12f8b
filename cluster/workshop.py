"""An artifact under construction: shards are staged, claimed and settled, and the manifest is written last.

`cluster.artifact` has the protocol and says why it is so. Workers hold an `Attempt` for a while; the driver holds the
`Workshop`, whose plain form travels to them.
"""

import json
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from cluster.artifact import (
    SCHEMA_VERSION,
    SHARDS_SCHEMA,
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
from cluster.parquet import write_table
from cluster.storage import Folder

STAGING = ".staging"


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
        name = receipt_name(shard, self.revision)
        return Receipt.from_bytes(self.folder.read(name)) if self.folder.exists(name) else None

    def committed(self) -> set[int]:
        """Shards of this revision that have a receipt."""
        suffix = revised(".json", self.revision)
        names = (name for name in (self.folder / "receipts").names() if name.endswith(suffix))
        return {int(stem) for name in names if (stem := name.removesuffix(suffix)).isdigit()}

    def recover(self) -> None:
        """Finish the move of every shard that was claimed by an attempt which did not live to settle it."""
        for name in (self.folder / STAGING).names():
            shard, _, attempt = name.partition("-")
            receipt = self.receipt(int(shard)) if shard.isdigit() else None
            if receipt is not None and receipt.attempt == attempt:
                self._settle(receipt)

    def _settle(self, receipt: Receipt) -> None:
        staged = f"{STAGING}/{receipt.shard:08d}-{receipt.attempt}"
        for entry in receipt.files:
            self.folder.settle(f"{staged}/{entry.stored_as}", entry.stored_as)
        self.folder.delete(staged)

    def publish(self, shard_count: int, *, fence: Callable[[], None] = lambda: None) -> Artifact:
        """Write `shards.parquet` and, last, the manifest. Their bytes depend on the receipts' content only.

        `fence` is called just before the manifest is replaced; it raises where another driver has taken over.
        """
        receipts = [receipt for shard in range(shard_count) if (receipt := self.receipt(shard)) is not None]
        if len(receipts) != shard_count:
            missing = sorted(set(range(shard_count)) - {receipt.shard for receipt in receipts})
            raise WorkFailed(f"{self.folder.uri} cannot be published: no receipt of shards {missing[:8]}.")
        self.recover()
        manifest, shards = _roll_up(self.request, self.revision, receipts)
        self.folder.write(manifest.shards, shards)
        fence()
        self.folder.write("manifest.json", manifest.to_bytes())
        self.folder.delete(STAGING)
        return Artifact(self.folder, manifest)


class Attempt:
    """One try at a shard: a private place for its files, and the commit that makes them the shard's."""

    def __init__(self, workshop: Workshop, shard: int) -> None:
        self._workshop = workshop
        self._shard = shard
        self._attempt = uuid.uuid4().hex[:16]
        self._staged = f"{STAGING}/{shard:08d}-{self._attempt}"
        self._names: list[str] = []
        folder = workshop.folder
        if folder.local:
            self._private = Path(folder.uri) / self._staged
            self._private.mkdir(parents=True)
        else:
            self._private = Path(tempfile.mkdtemp(prefix="unclip-attempt-"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._private, ignore_errors=True)

    def path(self, name: str) -> Path:
        """A private local path to write the file of that logical name to."""
        if name not in self._names:
            self._names.append(name)
        return self._private / revised(name, self._workshop.revision)

    def commit(self, *, rows: int, counts: dict[str, int], stats: dict[str, Any] | None = None) -> Receipt:
        """Flush, claim, settle. Returns the shard's receipt: another attempt's where that one was first."""
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
            stats=stats or {},
            attempt=self._attempt,
            host=socket.gethostname(),
            environment=environment_digest(),
        )
        if not folder.create(receipt_name(self._shard, revision), receipt.to_bytes()):
            folder.delete(self._staged)
            winner = self._workshop.receipt(self._shard)
            assert winner is not None, "a receipt is never deleted while its revision is being built"
            return winner
        self._workshop._settle(receipt)
        return receipt


def begin(folder: Folder, request: Request, environment: dict[str, str], *, allow_mixed: bool = False) -> Workshop:
    """Open the workshop for `request`: the one left by an earlier run of the same identity, or a new revision.

    Raises `UserError` where the one left was begun under other library versions, since its shards might differ in
    their bytes; `allow_mixed` continues all the same (receipts record each shard's environment).
    """
    folder.make()
    manifest = read_manifest(folder)
    published = manifest.revision if manifest else 0
    requests = read_requests(folder)
    newest = max(requests, default=0)
    if newest > published and requests[newest]["identity"] == json.loads(canonical_json(request.identity)):
        then = requests[newest]["environment"]
        if then != environment and not allow_mixed:
            changed = ", ".join(differences(then, environment, "")[:5])
            raise UserError(
                f"{folder.uri} was begun under other library versions ({changed}). Restore them, continue with "
                f"--allow-mixed, or start elsewhere with another --out."
            )
        return Workshop(folder.uri, newest)
    revision = max(newest, published) + 1
    body = json.dumps({"identity": request.identity, "environment": environment}, indent=1, sort_keys=True)
    if not folder.create(revised("request.json", revision), body.encode()):
        raise UserError(f"another driver has just begun revision {revision} of {folder.uri}.")
    return Workshop(folder.uri, revision)


def _roll_up(request: Request, revision: int, receipts: Iterable[Receipt]) -> tuple[Manifest, bytes]:
    rows: list[dict[str, Any]] = [
        {
            "shard": receipt.shard,
            "files": [asdict(entry) for entry in receipt.files],
            "sha256": receipt.sha256,
            "rows": receipt.rows,
            "counts": list(receipt.counts.items()),
        }
        for receipt in receipts
    ]
    with tempfile.TemporaryDirectory(prefix="unclip-") as scratch:
        path = Path(scratch) / "shards.parquet"
        write_table(path, pa.Table.from_pylist(rows, schema=SHARDS_SCHEMA))
        shards = path.read_bytes()
    counts: dict[str, int] = {}
    for row in rows:
        for name, count in row["counts"]:
            counts[name] = counts.get(name, 0) + count
    manifest = Manifest(
        kind=request.kind,
        schema_version=SCHEMA_VERSION,
        revision=revision,
        identity=request.identity,
        identity_digest=digest(request.identity),
        content_digest=digest([row["sha256"] for row in rows]),
        inputs=request.inputs,
        totals={"shards": len(rows), "rows": sum(row["rows"] for row in rows), "counts": dict(sorted(counts.items()))},
        shards=revised("shards.parquet", revision),
        shards_sha256=sha256_bytes(shards),
    )
    return manifest, shards
