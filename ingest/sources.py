"""Rows of a captioned-URL table, streamed, as the raw bytes that the file holds.

Everything that is wrong with a table as a whole (no file, no such column, no rows, numbers for captions) is a
`UserError` from `open_source`, before any work. What is wrong with one value costs that value only: text stays bytes
here, and `partition` decides what is valid UTF-8.

`source_file` is a file's path below the deepest folder that all the source's files share: moving the whole source
changes nothing.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import fsspec

from cluster.errors import UserError
from ingest.source_config import EvaluationSetConfig, SourceConfig
from ingest.tables import Table, table_of

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_HASH_CHUNK_BYTES = 1 << 20

FileFacts = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class SourceBatch:
    """Consecutive rows of one file. `None` is a null; the rest is bytes as they are."""

    source_file: str
    first_row: int
    urls: list[bytes | None]
    captions: list[bytes | None]


@dataclass(frozen=True)
class SourceFile:
    """A file of the source: its path on the filesystem, and the name that the tables call it by."""

    path: str
    name: str
    bytes: int
    modified: str


class TableSource:
    """A table of one or more files with a URL and a caption column."""

    def __init__(self, pairs: str, url_column: str, caption_column: str, *, key: str = "source.pairs") -> None:
        self._fs, self.files = _resolve(pairs, key)
        self._tables: list[tuple[SourceFile, Table]] = []
        for file in self.files:
            table = table_of(self._fs, file.path, url_column, caption_column)
            table.check()
            self._tables.append((file, table))
        if not any(table.has_rows() for _, table in self._tables):
            raise UserError(f"{key} {pairs!r} has no rows. Name a table that has some.")

    def batches(self) -> Iterator[SourceBatch]:
        for file, table in self._tables:
            row = 0
            for urls, captions in table.columns():
                yield SourceBatch(file.name, row, urls, captions)
                row += len(urls)

    def identity(self, remembered: FileFacts | None = None) -> dict[str, Any]:
        return {"files": _file_identities(self._fs, self.files, remembered)}


class FolderSource:
    """A folder of pictures, each with an optional text file of the same stem as its caption.

    The URL of such a pair is the picture's file name, which is what an evaluation key is; the images stage reads it
    from the folder instead of fetching it. A picture without a text file has the empty caption.
    """

    def __init__(self, folder: str) -> None:
        self._fs, root = _filesystem(folder, "folder")
        self.root = root.rstrip("/")
        if not self._fs.isdir(self.root):
            raise UserError(f"{folder!r} is not a folder. An evaluation set's folder holds name.jpg files.")
        found = {_relative(path, self.root): info for path, info in self._fs.find(self.root, detail=True).items()}
        self._pictures = sorted(name for name in found if name.lower().endswith(PICTURE_SUFFIXES))
        if not self._pictures:
            raise UserError(f"folder {folder!r} holds no picture ({', '.join(PICTURE_SUFFIXES)}).")
        captions = {str(PurePosixPath(name).with_suffix("")): name for name in sorted(found) if name.endswith(".txt")}
        self._captions = {name: captions.get(str(PurePosixPath(name).with_suffix(""))) for name in self._pictures}
        wanted = sorted({*self._pictures, *(name for name in self._captions.values() if name is not None)})
        self.files = [_source_file(f"{self.root}/{name}", name, found[name]) for name in wanted]

    def batches(self) -> Iterator[SourceBatch]:
        name_bytes: list[bytes | None] = [os.fsencode(name) for name in self._pictures]
        captions: list[bytes | None] = []
        for picture in self._pictures:
            text = self._captions[picture]
            captions.append(b"" if text is None else self._fs.cat_file(f"{self.root}/{text}").strip())
        yield SourceBatch("", 0, name_bytes, captions)

    def identity(self, remembered: FileFacts | None = None) -> dict[str, Any]:
        return {"files": _file_identities(self._fs, self.files, remembered)}


Source = TableSource | FolderSource


def open_source(pairs: str, *, url_column: str = "url", caption_column: str = "caption") -> TableSource:
    """The table at a path, glob or fsspec URI. Raises `UserError` where it cannot be a source."""
    return TableSource(pairs, url_column, caption_column)


def open_evaluation_set(config: EvaluationSetConfig, source: SourceConfig, *, scene_table: str | None = None) -> Source:
    """The rows of an evaluation set; `scene_table` is the table written for it where it is a set of scenes."""
    if config.folder is not None:
        return FolderSource(config.folder)
    if config.scenes is not None:
        if scene_table is None:
            raise UserError(f"evaluation set {config.name!r} asks for scenes, and source.scenes is not set.")
        return TableSource(scene_table, "url", "caption")
    assert config.pairs is not None
    key = f"evaluation_sets {config.name}.pairs"
    return TableSource(config.pairs, source.url_column, source.caption_column, key=key)


def source_identity(source: Source, remembered: FileFacts | None = None) -> dict[str, Any]:
    """Names, sizes and sha256 of the source's files. `remembered` (plain data, updated) saves hashing a file twice."""
    return source.identity(remembered)


def _filesystem(uri: str, key: str) -> tuple[Any, str]:
    try:
        filesystem, path = fsspec.core.url_to_fs(os.path.expanduser(uri))
    except (ImportError, ValueError) as error:
        raise UserError(f"{key} {uri!r} cannot be opened: {error}") from error
    return filesystem, path


def _resolve(pairs: str, key: str) -> tuple[Any, list[SourceFile]]:
    filesystem, path = _filesystem(pairs, key)
    try:
        paths = sorted(filesystem.glob(path)) if any(letter in path for letter in "*?[") else [path]
        facts = {path: filesystem.info(path) for path in paths}
    except FileNotFoundError:
        raise UserError(f"{key} {pairs!r} does not exist. Name a file, a glob or an fsspec URI.") from None
    except OSError as error:
        raise UserError(f"{key} {pairs!r} cannot be read: {error.strerror or error}") from error
    files = [path for path in paths if facts[path]["type"] == "file"]
    if not files:
        what = (
            "is a folder; name its files, as in folder/*.parquet" if paths and path == paths[0] else "matches no file"
        )
        raise UserError(f"{key} {pairs!r} {what}.")
    shared = os.path.commonpath([str(PurePosixPath(file).parent) for file in files])
    return filesystem, [_source_file(file, _relative(file, shared), facts[file]) for file in files]


def _relative(path: str, folder: str) -> str:
    return str(PurePosixPath(path).relative_to(folder)) if folder else path


def _source_file(path: str, name: str, info: dict[str, Any]) -> SourceFile:
    modified = info.get("mtime") or info.get("ETag") or info.get("etag") or info.get("LastModified") or ""
    return SourceFile(path, name, int(info["size"]), str(modified))


def _file_identities(filesystem: Any, files: list[SourceFile], remembered: FileFacts | None) -> list[dict[str, Any]]:
    remembered = {} if remembered is None else remembered
    identities = []
    for file in files:
        facts = remembered.get(file.path)
        # Without a modification time nothing tells a file from its successor of equal size.
        if facts is None or not file.modified or (facts["bytes"], facts["modified"]) != (file.bytes, file.modified):
            facts = {"bytes": file.bytes, "modified": file.modified, "sha256": _sha256(filesystem, file.path)}
            remembered[file.path] = facts
        identities.append({"name": file.name, "bytes": file.bytes, "sha256": facts["sha256"]})
    return identities


def _sha256(filesystem: Any, path: str) -> str:
    digest = hashlib.sha256()
    try:
        with filesystem.open(path, "rb") as file:
            while chunk := file.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"{path!r} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
