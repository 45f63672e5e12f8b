"""CSV, TSV and JSONL, as they are found: a line that cannot be read is a row all the same, of two nulls.

Arrow parses blocks of CSV; JSON has no binary, so its lines are decoded with surrogate escapes, which survive the
parser and turn back into the bytes that were there.
"""

import io
import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from cluster.errors import UserError
from ingest.lines import blocks
from ingest.tables import Columns, Table, is_text, unpacked

_JSON_ROWS_CHECKED = 100
_JSON_BATCH_ROWS = 8192
_BATCH_BYTES = 16 << 20
_SAMPLE_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class TextTable(Table):
    delimiter = b""

    def _blocks(self) -> Iterator[bytes]:
        quoted = self.delimiter if self.delimiter and self.layout.quoted else None
        # No table has as many columns as this line, and no line of JSON starts like it.
        lost = (self.delimiter or b"\0") * 65_536 + b"\n"
        with self._reading(), self._fs.open(self.path, "rb") as raw, unpacked(raw, self.path) as file:
            yield from blocks(file.read, lost, quoted)

    def estimated_rows(self, file_bytes: int) -> int:
        """From the mean length of the first rows, as they are stored."""
        with self._reading(), self._fs.open(self.path, "rb") as raw, unpacked(raw, self.path) as file:
            lines = file.read(_SAMPLE_BYTES).count(b"\n")
            stored_bytes = raw.tell()
        return lines if stored_bytes >= file_bytes else round(max(1, lines) * file_bytes / stored_bytes)


class CSV(TextTable):
    delimiter = b","

    def check(self) -> None:
        first = next(self._blocks(), b"")
        if not first.strip():
            raise UserError(f"{self.path!r} is empty; a {type(self).__name__} file starts with a line of column names.")
        with self._reading():
            schema = self._parsed(first, self._given_names(), {})[0].schema
        self._check_names(schema.names)
        for name in self._keys.values():
            kind = schema.field(name).type
            # A first block without any value says nothing about the rest.
            if not (is_text(kind) or pa.types.is_null(kind)):
                self._refuse_type(name, str(kind))

    def columns(self) -> Iterator[Columns]:
        url, caption = self._keys["source.url_column"], self.layout.caption_column
        names = self._given_names()
        types = dict.fromkeys((url, caption), pa.binary())
        for block in self._blocks():
            if not block.strip(b"\r\n"):
                continue
            header = names is None
            with self._reading():
                if names is None:
                    names = self._parsed(block, None, {})[0].schema.names
                    self._check_names(names)
                table, lost = self._parsed(block, None if header else names, types)
            # A row's number counts from 1, and the line of names is the first.
            places = np.asarray(lost, np.int64) - (2 if header else 1)
            yield _with_nulls(table[url], places), _with_nulls(table[caption], places)

    def _given_names(self) -> list[str] | None:
        return None if self.layout.column_names is None else list(self.layout.column_names)

    def _parsed(
        self, block: bytes, names: list[str] | None, types: dict[str, pa.DataType]
    ) -> tuple[pa.Table, list[int]]:
        """The block's rows, and the numbers of those that have too many values or too few."""
        lost: list[int] = []

        def skip(row: Any) -> str:
            lost.append(row.number)
            return "skip"

        table = pa.csv.read_csv(
            pa.BufferReader(block),
            read_options=pa.csv.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=names),
            parse_options=pa.csv.ParseOptions(
                delimiter=self.delimiter.decode(),
                quote_char='"' if self.layout.quoted else False,
                newlines_in_values=self.layout.quoted,
                invalid_row_handler=skip,
            ),
            convert_options=pa.csv.ConvertOptions(
                check_utf8=False,
                column_types=types,
                include_columns=list(types),
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
        return table, lost


class TSV(CSV):
    delimiter = b"\t"


class JSONL(TextTable):
    def _rows(self) -> Iterator[tuple[Any, int]]:
        """Each line's value, None where it has none, and its length."""
        for block in self._blocks():
            for line in io.BytesIO(block):
                if line.strip():
                    yield _parsed(line.removeprefix(_BYTE_ORDER_MARK)), len(line)

    def check(self) -> None:
        for number, (row, _) in enumerate(itertools.islice(self._rows(), _JSON_ROWS_CHECKED)):
            if not isinstance(row, dict):
                if number == 0:
                    raise UserError(f"the first line of {self.path!r} is not a JSON object; JSONL has one a line.")
                continue
            if number == 0:
                self._check_names([str(name) for name in row])
            for name in self._keys.values():
                value = row.get(name)
                if value is not None and not isinstance(value, str):
                    self._refuse_type(name, f"{type(value).__name__} ({json.dumps(value)[:40]})")

    def columns(self) -> Iterator[Columns]:
        names = (self._keys["source.url_column"], self.layout.caption_column)
        rows: list[list[bytes | None]] = []
        waiting_bytes = 0
        for row, line_bytes in self._rows():
            # A line that is no object is a row all the same: its values are null, and the ledger says so.
            fields = row if isinstance(row, dict) else {}
            rows.append([_json_bytes(fields.get(name)) for name in names])
            waiting_bytes += line_bytes
            if len(rows) == _JSON_BATCH_ROWS or waiting_bytes > _BATCH_BYTES:
                yield _transposed(rows)
                rows, waiting_bytes = [], 0
        if rows:
            yield _transposed(rows)


def _transposed(rows: list[list[bytes | None]]) -> Columns:
    urls, captions = zip(*rows, strict=True)
    return pa.array(urls, pa.large_binary()), pa.array(captions, pa.large_binary())


def _with_nulls(column: pa.ChunkedArray, places: "np.ndarray[Any, np.dtype[np.int64]]") -> pa.Array:
    """The column with a null at each of `places`, which are rows of the result."""
    values = column.combine_chunks().cast(pa.large_binary())
    if not len(places):
        return values
    taken = np.ones(len(values) + len(places), bool)
    taken[places] = False
    indices = np.cumsum(taken) - 1
    return values.take(pa.array(indices, mask=~taken))


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
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
