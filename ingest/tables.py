"""The file formats of a source: two columns of one file, as raw bytes and nulls, in batches.

Parquet and CSV values reach us unvalidated on purpose: Arrow reads both as binary. JSON has no binary, so its lines
are decoded with surrogate escapes, which survive the parser and turn back into the bytes that were there.
"""

import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from cluster.errors import UserError

BATCH_ROWS = 8192
_JSON_ROWS_CHECKED = 100

Columns = tuple[list[bytes | None], list[bytes | None]]


class Table(ABC):
    """One file. `check` reads its head only and raises `UserError` where the file cannot be a source."""

    def __init__(self, filesystem: Any, path: str, url_column: str, caption_column: str) -> None:
        self._fs = filesystem
        self.path = path
        self._keys = {"source.url_column": url_column, "source.caption_column": caption_column}
        self._names = (url_column, caption_column)

    @abstractmethod
    def check(self) -> None: ...

    @abstractmethod
    def columns(self) -> Iterator[Columns]: ...

    def has_rows(self) -> bool:
        return any(urls for urls, _ in self.columns())

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
        except (OSError, pa.ArrowException, EOFError) as error:
            text = getattr(error, "strerror", None) or str(error)
            raise UserError(f"{self.path!r} cannot be read as {type(self).__name__}: {text.splitlines()[0]}") from error


class Parquet(Table):
    def check(self) -> None:
        with self._reading(), self._fs.open(self.path, "rb") as file:
            schema = pq.ParquetFile(file).schema_arrow
        self._check_names(schema.names)
        for name in self._names:
            kind = schema.field(name).type
            if pa.types.is_dictionary(kind):
                kind = kind.value_type
            if not _is_text(kind):
                self._refuse_type(name, str(kind))

    def has_rows(self) -> bool:
        with self._reading(), self._fs.open(self.path, "rb") as file:
            return bool(pq.ParquetFile(file).metadata.num_rows)

    def columns(self) -> Iterator[Columns]:
        with self._reading(), self._fs.open(self.path, "rb") as file:
            for batch in pq.ParquetFile(file).iter_batches(BATCH_ROWS, columns=sorted(set(self._names))):
                yield _bytes_of(batch.column(self._names[0])), _bytes_of(batch.column(self._names[1]))


class CSV(Table):
    delimiter = ","

    def _open(self, file: Any, types: dict[str, pa.DataType]) -> Any:
        return pa.csv.open_csv(
            file,
            read_options=pa.csv.ReadOptions(use_threads=False),
            parse_options=pa.csv.ParseOptions(delimiter=self.delimiter, newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(
                check_utf8=False,
                column_types=types,
                include_columns=list(types),
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )

    def check(self) -> None:
        with self._reading(), self._fs.open(self.path, "rb", compression="infer") as file:
            if not file.read(1):
                raise UserError(
                    f"{self.path!r} is empty; a {type(self).__name__} file starts with a line of column names."
                )
            file.seek(0)
            schema = self._open(file, {}).schema
        self._check_names(schema.names)
        for name in self._names:
            kind = schema.field(name).type
            # A first block without any value says nothing about the rest.
            if not (_is_text(kind) or pa.types.is_null(kind)):
                self._refuse_type(name, str(kind))

    def columns(self) -> Iterator[Columns]:
        with self._reading(), self._fs.open(self.path, "rb", compression="infer") as file:
            for batch in self._open(file, dict.fromkeys(self._names, pa.binary())):
                yield _bytes_of(batch.column(self._names[0])), _bytes_of(batch.column(self._names[1]))


class TSV(CSV):
    delimiter = "\t"


class JSONL(Table):
    def _lines(self) -> Iterator[Any]:
        with self._reading(), self._fs.open(self.path, "rb", compression="infer") as file:
            for line in file:
                if line.strip():
                    yield _parsed(line)

    def check(self) -> None:
        for number, row in enumerate(itertools.islice(self._lines(), _JSON_ROWS_CHECKED)):
            if not isinstance(row, dict):
                if number == 0:
                    raise UserError(f"the first line of {self.path!r} is not a JSON object; JSONL has one a line.")
                continue
            if number == 0:
                self._check_names([str(name) for name in row])
            for name in self._names:
                value = row.get(name)
                if value is not None and not isinstance(value, str):
                    self._refuse_type(name, f"{type(value).__name__} ({json.dumps(value)[:40]})")

    def columns(self) -> Iterator[Columns]:
        lines = self._lines()
        while rows := list(itertools.islice(lines, BATCH_ROWS)):
            # A line that is no object is a row all the same: its values are null, and the ledger says so.
            objects = [row if isinstance(row, dict) else {} for row in rows]
            url, caption = ([_json_bytes(row.get(name)) for row in objects] for name in self._names)
            yield url, caption


_FORMATS: dict[str, type[Table]] = {
    ".parquet": Parquet,
    ".csv": CSV,
    ".tsv": TSV,
    ".jsonl": JSONL,
    ".ndjson": JSONL,
    ".json": JSONL,
}


def table_of(filesystem: Any, path: str, url_column: str, caption_column: str) -> Table:
    """The reader for a file, chosen by its name; `.gz`, `.bz2`, `.xz`, `.zst` after a text format are unpacked."""
    stem = path.lower()
    for packed in (".gz", ".bz2", ".xz", ".zst"):
        stem = stem.removesuffix(packed)
    for suffix, kind in _FORMATS.items():
        if stem.endswith(suffix):
            return kind(filesystem, path, url_column, caption_column)
    raise UserError(f"{path!r} has none of the endings that a source may have: {', '.join(_FORMATS)}.")


def _is_text(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(test(kind) for test in tests) or str(kind) in ("string_view", "binary_view")


def _bytes_of(column: Any) -> list[bytes | None]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    values: list[bytes | None] = column.cast(pa.large_binary()).to_pylist()
    return values


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8", "surrogateescape"))
    except ValueError:
        return None


def _json_bytes(value: Any) -> bytes | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        # An escaped lone surrogate (\ud800): no bytes of the file, and no text either.
        return text.encode("utf-8", "surrogatepass")
