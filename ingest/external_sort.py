"""An external sort of Arrow tables by integer columns: sorted runs on disk, merged as they are read.

Memory holds one run while tables are added (`RUN_BYTES`, about three times over as it is sorted), and one batch of
each run while they are merged. What fits into one run never touches the disk.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

RUN_BYTES = 48 << 20
BATCH_BYTES = 512 << 10
FAN_IN = 64

Numbers = np.ndarray[Any, np.dtype[Any]]


class SortedRuns:
    """Tables of one schema, added in any order, read sorted by `keys` as often as one likes.

    The keys are integers without nulls, and together they are unique: the result does not depend on the runs.
    """

    def __init__(self, folder: Path, name: str, keys: Sequence[str], *, run_bytes: int = RUN_BYTES) -> None:
        self._folder = folder
        self._name = name
        self._keys = tuple(keys)
        self._run_bytes = run_bytes
        self._waiting: list[pa.Table] = []
        self._waiting_bytes = 0
        self._runs: list[Path] = []
        self._written = 0
        self.rows = 0

    def add(self, table: pa.Table) -> None:
        if not table.num_rows:
            return
        self.rows += table.num_rows
        self._waiting.append(table)
        self._waiting_bytes += table.nbytes
        if self._waiting_bytes >= self._run_bytes:
            self._runs.append(self._write(iter([self._sorted_waiting()])))

    def sorted(self) -> Iterator[pa.Table]:
        if self._waiting and not self._runs:
            table = self._sorted_waiting()
            self._waiting, self._waiting_bytes = [table], 0
            return iter([table])
        if self._waiting:
            self._runs.append(self._write(iter([self._sorted_waiting()])))
        while len(self._runs) > FAN_IN:
            merged, self._runs = self._runs[:FAN_IN], self._runs[FAN_IN:]
            self._runs.append(self._write(self._merged(merged)))
            for path in merged:
                path.unlink()
        return self._merged(self._runs)

    def clear(self) -> None:
        for path in self._runs:
            path.unlink()
        self._runs, self._waiting, self._waiting_bytes = [], [], 0

    def _sorted_waiting(self) -> pa.Table:
        table = pa.concat_tables(self._waiting).combine_chunks()
        self._waiting, self._waiting_bytes = [], 0
        return table.take(pa.array(sorted_order(_columns(table, self._keys))))

    def _write(self, tables: Iterator[pa.Table]) -> Path:
        path = self._folder / f"{self._name}-{self._written:05d}.arrow"
        self._written += 1
        first = next(tables)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, first.schema) as writer:
            while first is not None:
                rows = max(1, BATCH_BYTES * first.num_rows // max(1, first.nbytes))
                writer.write_table(first, max_chunksize=rows)
                first = next(tables, None)
        return path

    def _merged(self, runs: list[Path]) -> Iterator[pa.Table]:
        """Each round gives out what is certain: all rows up to the smallest of the last keys in hand."""
        heads = [head for path in runs if (head := _Head.opened(path, self._keys)) is not None]
        while heads:
            bound = min(head.last for head in heads)
            table = pa.concat_tables([head.take(bound) for head in heads]).combine_chunks()
            yield table.take(pa.array(sorted_order(_columns(table, self._keys))))
            heads = [head for head in heads if head.refill()]


class _Head:
    """The batch of a run that is next to be merged."""

    def __init__(self, reader: Any, keys: tuple[str, ...]) -> None:
        self._reader = reader
        self._names = keys
        self._table: pa.Table | None = None
        self._start = 0

    @classmethod
    def opened(cls, path: Path, keys: tuple[str, ...]) -> "_Head | None":
        head = cls(pa.ipc.open_stream(pa.OSFile(str(path), "rb")), keys)
        return head if head.refill() else None

    def refill(self) -> bool:
        while self._table is None or self._start == self._table.num_rows:
            try:
                self._table = pa.Table.from_batches([self._reader.read_next_batch()])
            except StopIteration:
                return False
            self._keys = _columns(self._table, self._names)
            self._start = 0
        return True

    @property
    def last(self) -> tuple[int, ...]:
        return tuple(int(key[-1]) for key in self._keys)

    def take(self, bound: tuple[int, ...]) -> pa.Table:
        """The rows up to `bound`, inclusive."""
        assert self._table is not None
        low, high = self._start, self._table.num_rows
        for key, value in zip(self._keys, bound, strict=True):
            limit = key.dtype.type(value)
            low, high = (low + int(np.searchsorted(key[low:high], limit, side)) for side in ("left", "right"))
        start, self._start = self._start, high
        return self._table.slice(start, high - start)


class Ahead:
    """A stream of tables sorted by one column, taken piece by piece up to a bound."""

    def __init__(self, tables: Iterator[pa.Table], key: str) -> None:
        self._tables = tables
        self._key = key
        self._table: pa.Table | None = None

    def pieces(self, bound: int) -> Iterator[pa.Table]:
        """The rows not yet taken whose key is below `bound`, as they come."""
        while True:
            if self._table is None or not self._table.num_rows:
                self._table = next(self._tables, None)
                if self._table is None:
                    return
                continue
            keys = self._table[self._key].to_numpy()
            count = int(np.searchsorted(keys, bound))
            piece, self._table = self._table.slice(0, count), self._table.slice(count)
            if count:
                yield piece
            if self._table.num_rows:
                return

    def below(self, bound: int) -> pa.Table | None:
        """All of them at once: for keys of which there are no more than the bound allows."""
        pieces = list(self.pieces(bound))
        return pa.concat_tables(pieces) if pieces else None


def sorted_order(keys: list[Numbers]) -> Numbers:
    """The indices that sort by all keys. Most rows are told apart by the first; only the others look further."""
    order = np.argsort(keys[0], kind="stable")
    first = keys[0][order]
    tied = np.zeros(len(first), bool)
    tied[1:] = first[1:] == first[:-1]
    tied[:-1] |= tied[1:]
    if len(keys) > 1 and tied.any():
        places = np.flatnonzero(tied)
        rows = order[places]
        order[places] = rows[np.lexsort([key[rows] for key in reversed(keys)])]
    return order


def _columns(table: pa.Table, names: Sequence[str]) -> list[Numbers]:
    return [table[name].to_numpy() for name in names]
