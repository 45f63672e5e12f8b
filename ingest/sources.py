"""Rows of a source, streamed, as the raw bytes that its files hold: tables, tars of pictures, folders of pictures.

Everything that is wrong with a table as a whole (no file, no such column, no rows, numbers for captions) is a
`UserError` as it is opened, before any work. What is wrong with one value costs that value only: text stays bytes
here, and `partition` decides what is valid UTF-8.

A source that brings its pictures says where they are (`pictures()`), and `ingest.brought` reads them. Such a row's URL
is the one that the picture was downloaded from, where that is known; else it is a name that no other row has.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from cluster.errors import UserError
from ingest.presets import TableFormat
from ingest.source_config import EvaluationSetConfig, SourceConfig
from ingest.source_files import FileFacts, SourceFile, SourceFiles, below, find_files, open_filesystem, source_file
from ingest.tables import Table, table_of
from ingest.tar_samples import Sample, samples

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_CAPTION_BYTES = 16 << 20
_BATCH_ROWS = 8192
_BATCH_BYTES = 16 << 20

Values = Any  # an Arrow array of large_binary, or a sequence of bytes and None


@dataclass(frozen=True)
class SourceBatch:
    """Consecutive rows of one file. `None` is a null; the rest is bytes as they are.

    `offsets` and `lengths` say where a row's picture lies in the file; they are given by tars only.
    """

    source_file: str
    first_row: int
    urls: Values
    captions: Values
    offsets: Sequence[int | None] | None = None
    lengths: Sequence[int | None] | None = None


@dataclass(frozen=True)
class Estimate:
    """About how many rows a source has, and how many bytes its files."""

    rows: int
    bytes: int


class Source(ABC):
    """Rows in a fixed order, and the files that they come from."""

    found: SourceFiles

    @property
    def files(self) -> list[SourceFile]:
        return self.found.files

    @abstractmethod
    def batches(self) -> Iterator[SourceBatch]: ...

    @abstractmethod
    def estimate(self) -> Estimate:
        """Cheap: from what Parquet says of itself, from the first rows of text, and from some of many files."""

    def pictures(self) -> dict[str, Any] | None:
        """What `brought_pictures` reads the rows' pictures by; None where they are fetched from their URLs."""
        return None

    def identity(self, remembered: FileFacts | None = None) -> dict[str, Any]:
        return self.found.identity(remembered)


class TableSource(Source):
    """A table of one or more files with a URL and a caption column."""

    def __init__(self, pairs: str, layout: TableFormat, *, key: str = "source.pairs") -> None:
        self.found = find_files(pairs, key)
        self._layout = layout
        self._tables: list[tuple[SourceFile, Table]] = []
        for file in self.files:
            table = table_of(self.found.filesystem, file.path, layout)
            table.check()
            self._tables.append((file, table))
        if not any(table.has_rows() for _, table in self._tables):
            raise UserError(f"{key} {pairs!r} has no rows. Name a table that has some.")

    def batches(self) -> Iterator[SourceBatch]:
        for file, table in self._tables:
            row = 0
            for urls, captions in table.columns():
                if urls is None:
                    urls = [f"{file.name}#{row + n}".encode() for n in range(len(captions))]
                yield SourceBatch(file.name, row, urls, captions)
                row += len(captions)

    def estimate(self) -> Estimate:
        return _estimated(self.found, lambda index: self._tables[index][1].estimated_rows(self.files[index].bytes))

    def pictures(self) -> dict[str, Any] | None:
        if self._layout.image_column is None:
            return None
        columns = {"column": self._layout.image_column, "caption_column": self._layout.caption_column}
        return {"kind": "column", "root": self.found.root_uri} | columns


class TarSource(Source):
    """Webdataset tars, img2dataset's among them: `key.jpg`, with `key.txt` or `key.json` for caption and URL.

    Only headers and texts are read here. A picture that is no plain file (a link, a device, a sparse file) leaves its
    row without an offset; bytes that are no tar cost one row.
    """

    def __init__(self, pairs: str, *, key: str = "source.pairs") -> None:
        self.found = find_files(pairs, key)
        if not any(True for _ in self.batches()):
            raise UserError(
                f"{key} {pairs!r} has no pictures ({', '.join(PICTURE_SUFFIXES)}). Name tars that have some."
            )

    def batches(self) -> Iterator[SourceBatch]:
        for file in self.files:
            waiting: list[Sample] = []
            first = waiting_bytes = 0
            for sample in samples(self.found.filesystem, file, PICTURE_SUFFIXES, MAX_CAPTION_BYTES):
                waiting.append(sample)
                waiting_bytes += len(sample.caption or b"") + len(sample.url or b"")
                if len(waiting) == _BATCH_ROWS or waiting_bytes > _BATCH_BYTES:
                    yield _tar_batch(file, first, waiting)
                    first, waiting, waiting_bytes = first + len(waiting), [], 0
            if waiting:
                yield _tar_batch(file, first, waiting)

    def estimate(self) -> Estimate:
        def rows_of(index: int) -> int:
            found = samples(self.found.filesystem, self.files[index], PICTURE_SUFFIXES, MAX_CAPTION_BYTES)
            return sum(1 for _ in found)

        return _estimated(self.found, rows_of, at_most=2)

    def pictures(self) -> dict[str, Any] | None:
        return {"kind": "tars", "root": self.found.root_uri}


class FolderSource(Source):
    """A folder of pictures, each with an optional text file of the same stem as its caption.

    The URL of such a pair is the picture's file name, which is what an evaluation key is; the images stage reads it
    from the folder instead of fetching it. A picture without a text file has the empty caption.
    """

    def __init__(self, folder: str) -> None:
        filesystem, root = open_filesystem(folder, "folder")
        self.root = root.rstrip("/")
        if not filesystem.isdir(self.root):
            raise UserError(f"{folder!r} is not a folder. Name one that holds name.jpg files.")
        found = {below(path, self.root): info for path, info in filesystem.find(self.root, detail=True).items()}
        self._pictures = sorted(name for name in found if name.lower().endswith(PICTURE_SUFFIXES))
        if not self._pictures:
            raise UserError(f"folder {folder!r} holds no picture ({', '.join(PICTURE_SUFFIXES)}).")
        captions = {str(PurePosixPath(name).with_suffix("")): name for name in sorted(found) if name.endswith(".txt")}
        self._captions = {name: captions.get(str(PurePosixPath(name).with_suffix(""))) for name in self._pictures}
        wanted = sorted({*self._pictures, *(name for name in self._captions.values() if name is not None)})
        files = [source_file(f"{self.root}/{name}", name, found[name]) for name in wanted]
        self.found = SourceFiles(filesystem, self.root, files)

    def batches(self) -> Iterator[SourceBatch]:
        names: list[bytes] = []
        captions: list[bytes | None] = []
        first = waiting_bytes = 0
        for name in self._pictures:
            names.append(os.fsencode(name))
            captions.append(self._caption(self._captions[name]))
            waiting_bytes += len(captions[-1] or b"")
            if len(names) == _BATCH_ROWS or waiting_bytes > _BATCH_BYTES:
                yield SourceBatch("", first, names, captions)
                first, names, captions, waiting_bytes = first + len(names), [], [], 0
        if names:
            yield SourceBatch("", first, names, captions)

    def _caption(self, name: str | None) -> bytes | None:
        if name is None:
            return b""
        try:
            with self.found.filesystem.open(f"{self.root}/{name}", "rb") as file:
                text: bytes = file.read(MAX_CAPTION_BYTES + 1)
        except OSError:
            return None
        return text.strip() if len(text) <= MAX_CAPTION_BYTES else None

    def estimate(self) -> Estimate:
        return Estimate(len(self._pictures), self.found.bytes)

    def pictures(self) -> dict[str, Any] | None:
        return {"kind": "folder", "root": self.found.root_uri}


def open_source(pairs: str, *, url_column: str | None = None, caption_column: str | None = None) -> Source:
    """The table at a path, glob or fsspec URI. Raises `UserError` where it cannot be a source."""
    return open_pairs(pairs, SourceConfig(url_column=url_column, caption_column=caption_column).table_format())


def open_training_source(config: SourceConfig) -> Source:
    """The source that a configuration names, where it is not the built-in scenes."""
    if config.folder is not None:
        return FolderSource(config.folder)
    if config.pairs is None:
        raise UserError("source.pairs is not set. Name a table of URLs and captions: --set source.pairs=TABLE")
    return open_pairs(config.pairs, config.table_format())


def open_evaluation_set(config: EvaluationSetConfig, source: SourceConfig, *, scene_table: str | None = None) -> Source:
    """The rows of an evaluation set; `scene_table` is the table written for it where it is a set of scenes."""
    if config.folder is not None:
        return FolderSource(config.folder)
    if config.scenes is not None:
        if scene_table is None:
            raise UserError(f"evaluation set {config.name!r} asks for scenes, and source.scenes is not set.")
        return open_pairs(scene_table, TableFormat())
    assert config.pairs is not None
    return open_pairs(config.pairs, config.table_format_beside(source), key=f"evaluation_sets {config.name}.pairs")


def open_pairs(pairs: str, layout: TableFormat, *, key: str = "source.pairs") -> Source:
    """Tars or a table, by the ending of the name."""
    name = pairs.lower()
    if name.endswith(".tar"):
        return TarSource(pairs, key=key)
    if name.endswith((".tgz", ".tar.gz", ".tar.zst", ".tar.bz2", ".tar.xz")):
        raise UserError(
            f"{key} {pairs!r} is a packed tar, whose pictures cannot be read one by one. Unpack it to .tar."
        )
    return TableSource(pairs, layout, key=key)


def source_identity(source: Source, remembered: FileFacts | None = None) -> dict[str, Any]:
    """Names, sizes and sha256 of the source's files. `remembered` (plain data, updated) saves hashing a file twice."""
    return source.identity(remembered)


def _tar_batch(file: SourceFile, first: int, rows: list[Sample]) -> SourceBatch:
    return SourceBatch(
        file.name,
        first,
        [row.url for row in rows],
        [row.caption for row in rows],
        [row.offset for row in rows],
        [row.length for row in rows],
    )


def _estimated(found: SourceFiles, rows_of: Callable[[int], int], *, at_most: int = 100) -> Estimate:
    """Rows of some files, evenly chosen, for their bytes; then as many for the bytes of all."""
    chosen = range(0, len(found.files), -(-len(found.files) // at_most))
    rows = sum(rows_of(index) for index in chosen)
    chosen_bytes = sum(found.files[index].bytes for index in chosen)
    return Estimate(round(rows * found.bytes / max(1, chosen_bytes)), found.bytes)
