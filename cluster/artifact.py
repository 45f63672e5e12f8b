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
disturbed. Files have a logical name (`00000000.tar`) that never changes: use `Artifact.file`.

Two hashes. *Identity* is what was asked for: settings that shape content, inputs by content digest, code version.
*Content digest* is over the shards' hashes in order, so that a rebuild with
equal bytes leaves everything downstream current.
"""

import functools
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.canonical import canonical_json, digest, sha256_bytes
from cluster.errors import ArtifactNotFound, UserError, WorkFailed
from cluster.storage import Folder

SCHEMA_VERSION = 1
SHARDS_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        (
            "files",
            pa.list_(
                pa.struct(
                    [("name", pa.string()), ("stored_as", pa.string()), ("sha256", pa.string()), ("bytes", pa.int64())]
                )
            ),
        ),
        ("sha256", pa.string()),
        ("rows", pa.int64()),
        ("counts", pa.map_(pa.string(), pa.int64())),
    ]
)


@dataclass(frozen=True)
class FileEntry:
    """A data file of a shard: its logical name, where its bytes lie, and what they are."""

    name: str
    stored_as: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Receipt:
    """Proof that a shard is done. `files`, `rows` and `counts` are content; the rest tells how it came about."""

    shard: int
    files: tuple[FileEntry, ...]
    rows: int
    counts: dict[str, int]
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


@dataclass(frozen=True)
class ShardEntry:
    """A row of `shards.parquet`."""

    shard: int
    files: tuple[FileEntry, ...]
    sha256: str
    rows: int
    counts: dict[str, int]


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
    def shards(self) -> list[ShardEntry]:
        """All shards in order. Raises `WorkFailed` where the table is not the one that the manifest names."""
        data = self.folder.read(self.manifest.shards)
        if sha256_bytes(data) != self.manifest.shards_sha256:
            raise WorkFailed(f"{self.uri}/{self.manifest.shards} is not the table that its manifest names.")
        # On this thread alone: a process that ends right after pyarrow (26) has started one for a buffer aborts.
        table = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False)
        return [
            ShardEntry(
                shard=row["shard"],
                files=tuple(FileEntry(**entry) for entry in row["files"]),
                sha256=row["sha256"],
                rows=row["rows"],
                counts=dict(row["counts"]),
            )
            for row in table.to_pylist()
        ]

    @functools.cached_property
    def _files(self) -> dict[str, FileEntry]:
        return {entry.name: entry for shard in self.shards for entry in shard.files}

    def has(self, name: str) -> bool:
        return name in self._files

    def file(self, name: str) -> Path:
        """A path on this machine with the bytes of the file of that logical name."""
        if name not in self._files:
            raise WorkFailed(f"{self.uri} has no file {name!r}; it has {', '.join(sorted(self._files)[:8])}.")
        return self.folder.local_path(self._files[name].stored_as)

    def receipt(self, shard: int) -> Receipt:
        """The receipt of a shard, of the newest revision up to the manifest's that has one."""
        for revision in range(self.manifest.revision, 0, -1):
            name = receipt_name(shard, revision)
            if self.folder.exists(name):
                return Receipt.from_bytes(self.folder.read(name))
        raise WorkFailed(f"{self.uri} has no receipt of shard {shard}.")

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
    """Every request ever made at `folder`, by revision: {"identity": …, "environment": …}."""
    found = {}
    for name in folder.names():
        if name.startswith("request") and name.endswith(".json"):
            revision = 1 if name == "request.json" else int(name.removeprefix("request-r").removesuffix(".json"))
            found[revision] = json.loads(folder.read(name))
    return found


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
