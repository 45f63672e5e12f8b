"""The files that a source consists of: found by path, glob or fsspec URI, named, and told apart by their content.

A file's name is its path below the deepest folder that all the source's files share: moving the whole source changes
nothing.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import fsspec

from cluster.errors import UserError

_HASH_CHUNK_BYTES = 1 << 20
_PACKAGES = {
    "s3": "'unclip-pipeline[s3]'",
    "s3a": "'unclip-pipeline[s3]'",
    "gs": "'unclip-pipeline[gcs]'",
    "gcs": "'unclip-pipeline[gcs]'",
    "hf": "huggingface_hub",
}

FileFacts = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class SourceFile:
    """A file of the source: its path on the filesystem, and the name that the tables call it by."""

    path: str
    name: str
    bytes: int
    modified: str


@dataclass(frozen=True)
class SourceFiles:
    """Files on one filesystem, below `root`."""

    filesystem: Any
    root: str
    files: list[SourceFile]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def root_uri(self) -> str:
        """For a process elsewhere to open."""
        return str(self.filesystem.unstrip_protocol(self.root or "/"))

    def identity(self, remembered: FileFacts | None = None) -> dict[str, Any]:
        """Names, sizes and sha256. `remembered` (plain data, updated) saves hashing a file twice."""
        remembered = {} if remembered is None else remembered
        identities = []
        for file in self.files:
            facts = remembered.get(file.path)
            # Without a modification time nothing tells a file from its successor of equal size.
            if facts is None or not file.modified or (facts["bytes"], facts["modified"]) != (file.bytes, file.modified):
                sha256 = _sha256(self.filesystem, file.path)
                facts = {"bytes": file.bytes, "modified": file.modified, "sha256": sha256}
                remembered[file.path] = facts
            identities.append({"name": file.name, "bytes": file.bytes, "sha256": facts["sha256"]})
        return {"files": identities}


def open_filesystem(uri: str, key: str) -> tuple[Any, str]:
    """The filesystem of a path or URI, and the path on it. A package that is missing is named."""
    try:
        filesystem, path = fsspec.core.url_to_fs(os.path.expanduser(uri))
    except ImportError as error:
        protocol = uri.partition("://")[0]
        remedy = f"Install it: pip install {_PACKAGES[protocol]}" if protocol in _PACKAGES else str(error)
        raise UserError(f"{key} {uri!r} needs a package that is not installed. {remedy}") from error
    except ValueError as error:
        raise UserError(f"{key} {uri!r} cannot be opened: {error}") from error
    return filesystem, path


def find_files(pairs: str, key: str) -> SourceFiles:
    """The files that a path, a glob or a URI names, sorted. Raises `UserError` where there is none."""
    filesystem, path = open_filesystem(pairs, key)
    try:
        if any(letter in path for letter in "*?["):
            facts = filesystem.glob(path, detail=True)
        else:
            facts = {path: filesystem.info(path)}
    except FileNotFoundError:
        raise UserError(f"{key} {pairs!r} does not exist. Name a file, a glob or an fsspec URI.") from None
    except Exception as error:  # each filesystem's package has errors of its own: no credentials, no such bucket
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{key} {pairs!r} cannot be read: {reason}") from error
    files = sorted(found for found, info in facts.items() if info["type"] == "file")
    if not files:
        what = "is a folder; name its files, as in folder/*.parquet" if path in facts else "matches no file"
        raise UserError(f"{key} {pairs!r} {what}.")
    if unspeakable := [file for file in files if not _is_text(file)]:
        raise UserError(f"{key} {pairs!r} has a file whose name is not UTF-8: {unspeakable[0]!r}. Rename it.")
    shared = os.path.commonpath([str(PurePosixPath(file).parent) for file in files])
    return SourceFiles(filesystem, shared, [source_file(file, below(file, shared), facts[file]) for file in files])


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def below(path: str, folder: str) -> str:
    return str(PurePosixPath(path).relative_to(folder)) if folder else path


def source_file(path: str, name: str, info: dict[str, Any]) -> SourceFile:
    modified = info.get("mtime") or info.get("ETag") or info.get("etag") or info.get("LastModified") or ""
    return SourceFile(path, name, int(info["size"]), str(modified))


def _sha256(filesystem: Any, path: str) -> str:
    digest = hashlib.sha256()
    try:
        with filesystem.open(path, "rb") as file:
            while chunk := file.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"{path!r} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
