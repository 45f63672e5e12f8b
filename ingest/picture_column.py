"""Single rows of a Parquet with pictures and captions, without reading more of it than is needed.

A row group of pictures may be larger than memory, and has no index of rows: it is read on page by page from the last
row asked for, a few rows at a time. Rows asked for out of order start over elsewhere and leave the first place alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ingest.tables import bytes_of, open_uncached, parquet_by_pages

_PLACES = 8
_KEPT_ROWS = 32  # rows are asked for in about their order; what came last may still be wanted
_KEPT_BYTES = 8 << 20
_BATCH_BYTES = 2 << 20


@dataclass(frozen=True)
class PictureRow:
    """`None` where the cell is null."""

    picture: Any  # a buffer that is not copied yet
    caption: bytes | None


class _Place:
    """A row group being read, and the rows that came last."""

    def __init__(self, group: int, batches: Iterator[Any]) -> None:
        self.group = group
        self._batches = batches
        self._next = 0
        self._kept: list[tuple[int, Any]] = []

    def reaches(self, row: int) -> bool:
        return row >= (self._kept[0][0] if self._kept else self._next)

    def row(self, row: int) -> tuple[Any, int]:
        """The batch that has the row, and the row's place in it."""
        while row >= self._next:
            batch = next(self._batches, None)
            if batch is None:
                raise ValueError(f"the row group ends before row {row}")
            self._kept.append((self._next, batch))
            self._next += batch.num_rows
            while len(self._kept) > 1 and self._is_enough(self._kept[1:]):
                self._kept.pop(0)
        first, batch = next((first, batch) for first, batch in reversed(self._kept) if row >= first)
        return batch, row - first

    def _is_enough(self, kept: list[tuple[int, Any]]) -> bool:
        return self._next - kept[0][0] >= _KEPT_ROWS or sum(batch.nbytes for _, batch in kept) >= _KEPT_BYTES


class PictureColumn:
    """An open Parquet file."""

    def __init__(self, filesystem: Any, path: str, column: str, caption_column: str) -> None:
        self._file = open_uncached(filesystem, path)
        self._column, self._caption_column = column, caption_column
        self._places: list[_Place] = []  # the last used comes last
        try:
            self._parquet = parquet_by_pages(self._file)
            metadata = self._parquet.metadata
            groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
            if not {column, caption_column} <= set(self._parquet.schema_arrow.names):
                raise ValueError(f"{path!r} has no columns {column!r} and {caption_column!r}")
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

    def row(self, row: int) -> PictureRow:
        """Raises `ValueError` where the file has no such row."""
        group = next((group for group, end in enumerate(self._ends) if 0 <= row < end), None)
        if group is None:
            raise ValueError(f"no row {row}")
        inside = row - (self._ends[group - 1] if group else 0)
        place = next((p for p in reversed(self._places) if p.group == group and p.reaches(inside)), None)
        if place is None:
            columns = [self._column, self._caption_column]
            batches = self._parquet.iter_batches(self._batch_rows[group], row_groups=[group], columns=columns)
            place = _Place(group, batches)
            self._places = self._places[1 - _PLACES :]
        else:
            self._places.remove(place)
        self._places.append(place)
        batch, at = place.row(inside)
        pictures = batch.column(self._column)
        if pa.types.is_struct(pictures.type):
            pictures = pictures.flatten()[pictures.type.get_field_index("bytes")]
        picture = pictures[at].as_buffer() if pictures[at].is_valid else None
        return PictureRow(picture, bytes_of(batch.column(self._caption_column).slice(at, 1))[0].as_py())

    def close(self) -> None:
        self._places.clear()
        self._parquet.close()
        self._file.close()
