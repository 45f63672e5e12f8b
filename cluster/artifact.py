"""Artifacts: the one thing that stages exchange. A directory is an artifact once its `manifest.json` exists.

    <artifact>/
      request.json              what is being built, written before any work: identity and environment
      00000000.tar …            data files; never changed once their receipt exists
      receipts/00000000.json    created exclusively, one a shard: the first attempt wins
      shards.parquet            the receipts' content rolled up, one row a shard
      manifest.json             written last: identity, content digest, inputs, totals

A shard is committed in three moves, so that a kill between any two of them leaves the old state or the new one:

    stage    every file is written to `.staging/<shard>-<attempt>/`, a name that no other attempt has, and flushed
    claim    the receipt is created exclusively; it names the attempt. A loser deletes its own files, and only those
    settle   the winner's files move to their public names; whoever finds a claimed, unsettled shard finishes the move

Claiming before settling means that a slow attempt from a killed run can never put its bytes under another's receipt
(docs/decisions/0001-claim-before-settle.md).

A later *revision* of an artifact (its inputs changed, or a rebuild was asked for) writes `00000000-r2.tar`,
`receipts/00000000-r2.json`, `shards-r2.parquet`, and replaces the manifest last; readers of the old one are not
disturbed. Shards that it need not change it *inherits*: its table names the earlier revision's files, and their
receipts stay theirs. Files have a logical name (`00000000.tar`) that never changes: use `Artifact.file`.

Two hashes. *Identity* is what was asked for: settings that shape content, inputs by content digest, code version.
*Content digest* is over the shards' hashes in order, so that a rebuild with
equal bytes leaves everything downstream current.
"""

import functools
import json
import os
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from cluster.canonical import canonical_json, digest, sha256_bytes
from cluster.errors import ArtifactNotFound, UserError, WorkFailed
from cluster.shards import FileEntry as FileEntry
from cluster.shards import ShardEntry as ShardEntry
from cluster.shards import ShardTable
from cluster.storage import Folder

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Receipt:
    """Proof that a shard is done. `files`, `rows` and `counts` are content; the rest tells how it came about.

    `made_from` is the digest of the input shards that it was made from, "" where it has none of its own: a later
    revision takes over the shards whose inputs are the same.
    """

    shard: int
    files: tuple[FileEntry, ...]
    rows: int
    counts: dict[str, int]
    made_from: str = ""
    stats: dict[str, Any] = field(default_factory=dict)
    attempt: str = ""
    host: str = ""
    environment: str = ""

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        plain = json.loads(data)
        return cls(**{**plain, "files": tuple(FileEntry(**entry) for entry in plain["files"])})

    @property
    def sha256(self) -> str:
        """Hash of the shard's content: logical names and bytes, not where they are stored."""
        return digest([[entry.name, entry.sha256] for entry in self.files])

    @property
    def entry(self) -> ShardEntry:
        """What of it stands in the table of shards."""
        return ShardEntry(self.shard, self.files, self.sha256, self.rows, self.counts, self.made_from)


@dataclass(frozen=True)
class Request:
    """What is asked for: the identity of an artifact before it exists."""

    kind: str
    code_version: int
    settings: dict[str, Any]
    inputs: dict[str, str]

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "code_version": self.code_version,
            "settings": self.settings,
            "inputs": self.inputs,
        }

    def differing_fields(self, identity: dict[str, Any], *, with_inputs: bool = True) -> list[str]:
        """Dotted names, with both values, of the fields in which an existing identity differs from this one."""
        ours, theirs = dict(self.identity), dict(identity)
        if not with_inputs:
            ours.pop("inputs"), theirs.pop("inputs", None)
        return differences(theirs, json.loads(canonical_json(ours)), "")


@dataclass(frozen=True)
class Manifest:
    kind: str
    schema_version: int
    revision: int
    identity: dict[str, Any]
    identity_digest: str
    content_digest: str
    inputs: dict[str, str]
    totals: dict[str, Any]
    shards: str
    shards_sha256: str

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, uri: str) -> Self:
        try:
            manifest = cls(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise WorkFailed(f"{uri}/manifest.json is not a manifest: {error}") from error
        if manifest.schema_version > SCHEMA_VERSION:
            raise UserError(
                f"{uri} has schema version {manifest.schema_version}; this unclip reads up to {SCHEMA_VERSION}. "
                f"Use the version that wrote it, or a newer one."
            )
        return manifest


class Artifact:
    """A published artifact, read by its manifest and never by globbing."""

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, uri: str | Folder) -> Self:
        folder = uri if isinstance(uri, Folder) else Folder(uri)
        manifest = read_manifest(folder)
        if manifest is None:
            raise ArtifactNotFound(f"{folder.uri} has no manifest.json: nothing is published there.")
        return cls(folder, manifest)

    def __repr__(self) -> str:
        return f"Artifact({self.uri!r}, {self.content_digest[:12]})"

    @property
    def uri(self) -> str:
        return self.folder.uri

    @property
    def content_digest(self) -> str:
        return self.manifest.content_digest

    @property
    def rows(self) -> int:
        return int(self.manifest.totals["rows"])

    @property
    def shard_count(self) -> int:
        return int(self.manifest.totals["shards"])

    @functools.cached_property
    def shards(self) -> ShardTable:
        """All shards in order. Raises `WorkFailed` where the table is not the one that the manifest names."""
        return _read_shards(self.uri, self.manifest.shards, self.manifest.shards_sha256)

    def has(self, name: str) -> bool:
        return self.shards.file(name) is not None

    def file(self, name: str) -> Path:
        """A path on this machine with the bytes of the file of that logical name."""
        return self.folder.local_path(self._stored_as(name))

    def borrowed(self, name: str) -> AbstractContextManager[Path]:
        """The same for the length of a block: from an object store a copy that is deleted after it."""
        return self.folder.borrowed(self._stored_as(name))

    def _stored_as(self, name: str) -> str:
        entry = self.shards.file(name)
        if entry is None:
            some = [file.name for shard in self.shards[:8] for file in shard.files][:8]
            raise WorkFailed(f"{self.uri} has no file {name!r}; it has {', '.join(some)}.")
        return entry.stored_as

    def receipt(self, shard: int) -> Receipt:
        """The receipt of the files that the manifest names for a shard, whatever revisions lie beside it."""
        entry, found = self.shards[shard], False
        for revision in revisions_of(entry, self.manifest.revision):
            try:
                receipt = Receipt.from_bytes(self.folder.read(receipt_name(shard, revision)))
            except FileNotFoundError:
                continue
            if receipt.entry == entry:
                return receipt
            found = True
        if found:
            raise WorkFailed(f"shard {shard}: receipt and {self.manifest.shards} of {self.uri} disagree")
        raise WorkFailed(f"shard {shard}: its receipt is missing from {self.uri}")

    def stats(self, shard: int) -> dict[str, Any]:
        """How the shard came about (times, hosts, attempts): no content."""
        return self.receipt(shard).stats


def read_manifest(folder: Folder) -> Manifest | None:
    """The manifest at `folder`, or None where nothing is published."""
    try:
        return Manifest.from_bytes(folder.read("manifest.json"), folder.uri)
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_requests(folder: Folder) -> dict[int, dict[str, Any]]:
    """Every request ever made at `folder`, by revision: {"identity": …, "environment": …, "amends": …}.

    They are numbered without gaps and never deleted: no listing, which may be of 10⁶ files, is needed to find them.
    """
    found: dict[int, dict[str, Any]] = {}
    while True:
        try:
            found[len(found) + 1] = json.loads(folder.read(revised("request.json", len(found) + 1)))
        except (FileNotFoundError, NotADirectoryError):
            return found


@functools.lru_cache(maxsize=8)
def _read_shards(uri: str, name: str, sha256: str) -> ShardTable:
    """Read once a process: a worker opens the same artifact for every shard that it works on."""
    data = Folder(uri).read(name)
    if sha256_bytes(data) != sha256:
        raise WorkFailed(f"{uri}/{name} is not the table that its manifest names.")
    return ShardTable.from_bytes(data)


def revisions_of(entry: ShardEntry, newest: int) -> list[int]:
    """The revisions that can have written an entry's files, newest first: their stored names say which."""
    return [
        revision
        for revision in range(newest, 0, -1)
        if all(file.stored_as == revised(file.name, revision) for file in entry.files)
    ]


def receipt_name(shard: int, revision: int) -> str:
    return f"receipts/{revised(f'{shard:08d}.json', revision)}"


def revised(name: str, revision: int) -> str:
    """`00000000.tar` → `00000000-r2.tar`; the first revision keeps the plain name."""
    if revision == 1:
        return name
    stem, dot, extension = os.path.basename(name).partition(".")
    return f"{stem}-r{revision}{dot}{extension}"


def differences(old: Any, new: Any, path: str) -> list[str]:
    """`path: old → new` for every leaf in which two plain values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for index in range(len(old)) for line in differences(old[index], new[index], f"{path}[{index}]")]
    return [] if old == new else [f"{path}: {_shortened(old)} → {_shortened(new)}"]


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"
