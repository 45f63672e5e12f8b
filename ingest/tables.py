"""The file formats of a source: the URL and caption columns of one file, as raw bytes and nulls, in batches.

Values reach us unvalidated on purpose: Arrow reads text as binary. Memory is bounded whatever the file holds: Parquet
is read page by page, text in blocks of whole records (`ingest.lines`).
"""

import lzma
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from cluster.errors import UserError
from ingest.presets import TableFormat

BATCH_ROWS = 8192
BATCH_BYTES = 64 << 20
_PAGE_BUFFER_BYTES = 2 << 20
_PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}

Columns = tuple[pa.Array | None, pa.Array]  # URLs (None where the table has none) and captions, large_binary


class Table(ABC):
    """One file. `check` reads its head only and raises `UserError` where the file cannot be a source."""

    def __init__(self, filesystem: Any, path: str, layout: TableFormat) -> None:
        self._fs = filesystem
        self.path = path
        self.layout = layout
        self._keys = {"source.url_column": layout.url_column, "source.caption_column": layout.caption_column}

    @abstractmethod
    def check(self) -> None: ...

    @abstractmethod
    def columns(self) -> Iterator[Columns]: ...

    @abstractmethod
    def estimated_rows(self, file_bytes: int) -> int: ...

    def has_rows(self) -> bool:
        return any(len(captions) for _, captions in self.columns())

    def _check_names(self, there: list[str]) -> None:
        for key, name in self._keys.items():
            if name not in there:
                raise UserError(
                    f"{self.path!r} has no column {name!r}; it has {', '.join(map(repr, there)) or 'none'}. Set {key}."
                )

    def _refuse_type(self, name: str, what: str) -> None:
        key = next(key for key, value in self._keys.items() if value == name)
        raise UserError(f"column {name!r} of {self.path!r} holds {what}, not text. Set {key} to a column of text.")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Whatever a format's library says about a file becomes one line about that file."""
        try:
            yield
        except (OSError, pa.ArrowException, EOFError, lzma.LZMAError) as error:
            text = getattr(error, "strerror", None) or str(error)
            first = next(iter(text.splitlines()), type(error).__name__)
            raise UserError(f"{self.path!r} cannot be read as {type(self).__name__}: {first}") from error


class Parquet(Table):
    def check(self) -> None:
        with self._opened() as file:
            schema = file.schema_arrow
        layout = self.layout
        if not layout.url_required and layout.url_column not in schema.names:
            del self._keys["source.url_column"]
        if layout.image_column is not None:
            self._check_pictures(schema, layout.image_column)
        self._check_names(schema.names)
        for name in self._keys.values():
            kind = schema.field(name).type
            if pa.types.is_dictionary(kind):
                kind = kind.value_type
            if not is_text(kind):
                self._refuse_type(name, str(kind))

    def _check_pictures(self, schema: pa.Schema, name: str) -> None:
        if name not in schema.names:
            there = ", ".join(map(repr, schema.names))
            raise UserError(f"{self.path!r} has no column {name!r}; it has {there}. Set source.image_column.")
        if not is_pictures(schema.field(name).type):
            raise UserError(
                f"column {name!r} of {self.path!r} holds {schema.field(name).type}, not pictures as bytes. "
                "Set source.image_column to a column of binary, or of a struct with `bytes`."
            )

    def has_rows(self) -> bool:
        with self._opened() as file:
            return bool(file.metadata.num_rows)

    def estimated_rows(self, file_bytes: int) -> int:
        with self._opened() as file:
            return int(file.metadata.num_rows)

    def columns(self) -> Iterator[Columns]:
        url, caption = self._keys.get("source.url_column"), self.layout.caption_column
        with self._opened() as file:
            for group in range(file.num_row_groups):
                rows = _batch_rows(file.metadata.row_group(group), {url, caption})
                for batch in file.iter_batches(rows, row_groups=[group], columns=sorted({caption, url or caption})):
                    urls = None if url is None else bytes_of(batch.column(url))
                    yield urls, bytes_of(batch.column(caption))

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        with self._reading(), open_uncached(self._fs, self.path) as file:
            yield parquet_by_pages(file)


def open_uncached(filesystem: Any, path: str) -> Any:
    """A file to jump about in: a cache that reads ahead would fetch a remote one many times over."""
    local = isinstance(filesystem, LocalFileSystem)
    return filesystem.open(path, "rb") if local else filesystem.open(path, "rb", cache_type="none")


def parquet_by_pages(file: Any) -> Any:
    """With a buffer, column chunks are read page by page: a row group may be larger than memory."""
    return pq.ParquetFile(file, buffer_size=_PAGE_BUFFER_BYTES, pre_buffer=False)


def _batch_rows(group: Any, names: set[str | None]) -> int:
    """Fewer rows at a time where values are long, and fewer still than their mean asks for: they come in clusters."""
    chunks = (group.column(index) for index in range(group.num_columns))
    total: int = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in names)
    if total <= BATCH_BYTES:
        return BATCH_ROWS
    return max(16, min(BATCH_ROWS, BATCH_BYTES * int(group.num_rows) // total // 16))


@contextmanager
def unpacked(file: Any, path: str) -> Iterator[IO[bytes]]:
    """The bytes of an open file, decompressed as the ending of its name says."""
    ending = path[path.rfind(".") :].lower()
    if ending == ".xz":
        with lzma.LZMAFile(file) as stream:
            yield stream
    elif ending in _PACKED:
        with pa.CompressedInputStream(pa.PythonFile(file, mode="r"), _PACKED[ending]) as stream:
            yield stream
    else:
        yield file


def table_of(filesystem: Any, path: str, layout: TableFormat) -> Table:
    """The reader for a file, chosen by its name; `.gz`, `.zst`, `.bz2`, `.xz` after a text format are unpacked."""
    from ingest.text_tables import CSV, JSONL, TSV

    formats: dict[str, type[Table]] = {
        ".parquet": Parquet,
        ".csv": CSV,
        ".tsv": TSV,
        ".jsonl": JSONL,
        ".ndjson": JSONL,
        ".json": JSONL,
    }
    name = path.lower()
    stem = name
    for packed in (*_PACKED, ".xz"):
        stem = stem.removesuffix(packed)
    kind = next((kind for suffix, kind in formats.items() if stem.endswith(suffix)), None)
    if kind is None:
        raise UserError(f"{path!r} has none of the endings that a source may have: {', '.join(formats)}, .tar.")
    if kind is Parquet and stem != name:
        raise UserError(f"{path!r} is a packed Parquet, which cannot be read from the middle. Unpack it.")
    if kind is not Parquet and layout.image_column is not None:
        raise UserError(f"{path!r} holds no pictures: source.image_column is for Parquet. Unset it.")
    return kind(filesystem, path, layout)


def is_text(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(test(kind) for test in tests) or str(kind) in ("string_view", "binary_view")


def is_pictures(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:  # as the datasets library stores images
        kind = kind.field("bytes").type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or str(kind) == "binary_view"


def bytes_of(column: pa.Array) -> pa.Array:
    """A column of text as the bytes that it is stored as."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_binary())
