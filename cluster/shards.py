"""The table of shards: one row a shard, what every receipt proves about content (`shards.parquet`).

Held as Arrow columns and read a row at a time, so that 10⁶ shards cost a few hundred MB and not gigabytes of objects.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.parquet import write_table

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
        ("made_from", pa.string()),
    ]
)
BATCH_ROWS = 4096


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A data file of a shard: its logical name, where its bytes lie, and what they are."""

    name: str
    stored_as: str
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """A row of `shards.parquet`."""

    shard: int
    files: tuple[FileEntry, ...]
    sha256: str
    rows: int
    counts: dict[str, int]
    made_from: str = ""


class ShardTable(Sequence[ShardEntry]):
    """The entries in order of their numbers."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table.combine_chunks()

    @classmethod
    def from_entries(cls, batches: Iterator[list[ShardEntry]]) -> "ShardTable":
        """The table of `batches` one after another; only one batch is ever held as objects."""
        parts = [pa.RecordBatch.from_pylist([_plain(entry) for entry in batch], SHARDS_SCHEMA) for batch in batches]
        return cls(pa.Table.from_batches(parts, SHARDS_SCHEMA))

    @classmethod
    def from_bytes(cls, data: bytes) -> "ShardTable":
        # On this thread alone: a process that ends right after pyarrow (26) has started one for a buffer aborts.
        return cls(pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False))

    def write(self, path: Path) -> None:
        write_table(path, self._table)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, index: int) -> ShardEntry: ...
    @overload
    def __getitem__(self, index: slice) -> list[ShardEntry]: ...
    def __getitem__(self, index: int | slice) -> ShardEntry | list[ShardEntry]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return [self[position] for position in range(start, stop, step)]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"shard {index} of {len(self)}")
        return _entry(self._table.slice(position, 1).to_pylist()[0])

    def __iter__(self) -> Iterator[ShardEntry]:
        for start in range(0, len(self), BATCH_ROWS):
            yield from map(_entry, self._table.slice(start, BATCH_ROWS).to_pylist())

    @property
    def numbers(self) -> list[int]:
        numbers: list[int] = self._table.column("shard").to_pylist()
        return numbers

    @property
    def row_counts(self) -> list[int]:
        counts: list[int] = self._table.column("rows").to_pylist()
        return counts

    @property
    def hashes(self) -> list[str]:
        """The shards' sha256 in order: what the content digest is taken over."""
        hashes: list[str] = self._table.column("sha256").to_pylist()
        return hashes

    @property
    def rows(self) -> int:
        return int(pc.sum(self._table.column("rows")).as_py() or 0)

    @property
    def counts(self) -> dict[str, int]:
        """Rows by outcome, over all shards."""
        found: dict[str, int] = {}
        for start in range(0, len(self), BATCH_ROWS):
            for counts in self._table.column("counts").slice(start, BATCH_ROWS).to_pylist():
                for name, count in counts:
                    found[name] = found.get(name, 0) + count
        return dict(sorted(found.items()))

    def file(self, name: str) -> FileEntry | None:
        """The file of that logical name. Names begin with their shard's number, save in artifacts of one shard."""
        number = name[:8]
        shard = int(number) if number.isascii() and number.isdigit() and len(number) == 8 else 0
        if shard >= len(self):
            return None
        return next((entry for entry in self[shard].files if entry.name == name), None)


class ChosenShards(Mapping[int, ShardEntry]):
    """Some entries of a table by number, read when asked for: 10⁶ of them are never held at once."""

    def __init__(self, table: ShardTable, numbers: Collection[int]) -> None:
        self._table = table
        self._numbers = frozenset(numbers)

    def __getitem__(self, shard: int) -> ShardEntry:
        if shard not in self._numbers:
            raise KeyError(shard)
        return self._table[shard]

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._numbers))

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, shard: object) -> bool:
        return shard in self._numbers


def _plain(entry: ShardEntry) -> dict[str, Any]:
    return {
        "shard": entry.shard,
        "files": [
            {"name": file.name, "stored_as": file.stored_as, "sha256": file.sha256, "bytes": file.bytes}
            for file in entry.files
        ],
        "sha256": entry.sha256,
        "rows": entry.rows,
        "counts": list(entry.counts.items()),
        "made_from": entry.made_from,
    }


def _entry(row: dict[str, Any]) -> ShardEntry:
    return ShardEntry(
        shard=row["shard"],
        files=tuple(FileEntry(**file) for file in row["files"]),
        sha256=row["sha256"],
        rows=row["rows"],
        counts=dict(row["counts"]),
        made_from=row.get("made_from", ""),  # absent from tables of before it was recorded
    )
