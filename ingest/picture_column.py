"""Single cells of a Parquet column of pictures, without reading more of it than is needed.

A row group of pictures may be larger than memory, and has no index of cells: it is read on page by page from the last
cell asked for, a few rows at a time. Rows asked for out of order start over elsewhere and leave the first place alone.
"""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_PLACES = 8
_KEPT_ROWS = 32  # rows are asked for in about their order; what came last may still be wanted
_KEPT_BYTES = 8 << 20
_BATCH_BYTES = 2 << 20
_BUFFER_BYTES = 1 << 20


class _Place:
    """A row group being read, and the rows that came last."""

    def __init__(self, group: int, batches: Iterator[Any], first: int) -> None:
        self.group = group
        self._batches = batches
        self._next = first
        self._kept: list[tuple[int, pa.Array]] = []

    def reaches(self, row: int) -> bool:
        return row >= (self._kept[0][0] if self._kept else self._next)

    def cell(self, row: int) -> Any:
        while row >= self._next:
            batch = next(self._batches, None)
            if batch is None:
                raise ValueError(f"the row group ends before row {row}")
            column = batch.column(0)
            if pa.types.is_struct(column.type):
                column = column.flatten()[column.type.get_field_index("bytes")]
            self._kept.append((self._next, column))
            self._next += len(column)
            while len(self._kept) > 1 and self._is_enough(self._kept[1:]):
                self._kept.pop(0)
        first, column = next((first, column) for first, column in reversed(self._kept) if row >= first)
        return column[row - first]

    def _is_enough(self, kept: list[tuple[int, pa.Array]]) -> bool:
        return self._next - kept[0][0] >= _KEPT_ROWS or sum(column.nbytes for _, column in kept) >= _KEPT_BYTES


class PictureColumn:
    """An open Parquet file."""

    def __init__(self, filesystem: Any, path: str, column: str) -> None:
        self._file = filesystem.open(path, "rb")
        self._column = column
        self._places: list[_Place] = []  # the last used comes last
        try:
            self._parquet = pq.ParquetFile(self._file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
            metadata = self._parquet.metadata
            groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
            if column not in self._parquet.schema_arrow.names:
                raise ValueError(f"{path!r} has no column {column!r}")
        except (pa.ArrowException, OSError, ValueError):
            self._file.close()
            raise
        self._ends: list[int] = []
        self._batch_rows: list[int] = []
        for group in groups:
            self._ends.append((self._ends[-1] if self._ends else 0) + group.num_rows)
            chunks = [group.column(index) for index in range(group.num_columns)]
            named = [c for c in chunks if c.path_in_schema.partition(".")[0] == column]
            mean = sum(c.total_uncompressed_size for c in named) // max(1, group.num_rows)
            self._batch_rows.append(max(1, min(64, _BATCH_BYTES // max(1, mean))))

    def cell(self, row: int) -> Any:
        """The cell, None where it is null. Raises `ValueError` where the file has no such row."""
        group = next((group for group, end in enumerate(self._ends) if 0 <= row < end), None)
        if group is None:
            raise ValueError(f"no row {row}")
        inside = row - (self._ends[group - 1] if group else 0)
        place = next((p for p in reversed(self._places) if p.group == group and p.reaches(inside)), None)
        if place is None:
            batches = self._parquet.iter_batches(self._batch_rows[group], row_groups=[group], columns=[self._column])
            place = _Place(group, batches, 0)
            self._places = self._places[1 - _PLACES :]
        else:
            self._places.remove(place)
        self._places.append(place)
        value = place.cell(inside)
        return value.as_buffer() if value.is_valid else None

    def close(self) -> None:
        self._places.clear()
        self._parquet.close()
        self._file.close()
