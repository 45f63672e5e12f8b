"""Rows on their way through disk: dealt into files by a hash of one column, so that equal values meet in one file.

Memory holds at most `HELD_ROWS` rows while rows are dealt, and one bucket while they are read back.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

HELD_ROWS = 200_000


class Spill:
    """Rows of one schema in `buckets` files. What was added first is read first, within a bucket."""

    def __init__(self, folder: Path, column: str, schema: pa.Schema, buckets: int) -> None:
        self._folder = folder
        self._column = column
        self._schema = schema
        self._count = buckets
        self._held: list[pa.Table] = []
        self._held_rows = self.rows = 0

    def add(self, table: pa.Table) -> None:
        self._held.append(table)
        self._held_rows += table.num_rows
        self.rows += table.num_rows
        if self._held_rows >= HELD_ROWS:
            self._flush()

    def buckets(self) -> Iterator[pa.Table]:
        """Every bucket in turn, an empty one too."""
        self._flush()
        for bucket in range(self._count):
            yield self._read(bucket)

    def _flush(self) -> None:
        if not self._held_rows:
            return
        self._folder.mkdir(exist_ok=True)
        table = pa.concat_tables(self._held).combine_chunks()
        self._held, self._held_rows = [], 0
        places = _bucket_of(table[self._column], self._count)
        order = np.argsort(places, kind="stable")
        bounds = np.searchsorted(places[order], np.arange(self._count + 1))
        table = table.take(pa.array(order))
        for bucket in np.flatnonzero(np.diff(bounds)):
            rows = table.slice(bounds[bucket], bounds[bucket + 1] - bounds[bucket])
            # One stream after another in the same file: no file stays open, however many buckets there are.
            with self._path(int(bucket)).open("ab") as file, pa.ipc.new_stream(file, self._schema) as stream:
                stream.write_table(rows)

    def _read(self, bucket: int) -> pa.Table:
        path = self._path(bucket)
        tables = [self._schema.empty_table()]
        if path.exists():
            with path.open("rb") as file:
                size = path.stat().st_size
                while file.tell() < size:
                    tables.append(pa.ipc.open_stream(file).read_all())
        return pa.concat_tables(tables).combine_chunks()

    def _path(self, bucket: int) -> Path:
        return self._folder / f"{bucket:04d}.arrows"


def _bucket_of(column: pa.ChunkedArray, count: int) -> NDArray[np.int64]:
    """A number below `count` for each value, equal for equal values (in this process, which is all that is asked)."""
    values = column.cast(pa.binary()).to_pylist()
    return np.fromiter((hash(value) % count for value in values), dtype=np.int64, count=len(values))
