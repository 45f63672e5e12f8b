"""The order and the marks of `pairs`, found in bounded memory however long the table is.

    hash      source ──► ids of every row, in the source's order, on disk
    find      ids ──► sorted by pair: exact duplicates;  sorted by URL: rows that follow an earlier row of their URL
                      ──► one `Event` a row that is either, sorted by position
    gather    source ──► the rows that must move forward, whole, sorted by where they go
    deal      source, less the rows that move, merged with those that do

A row's key in the result is (first, position): the position of its URL's first row, and its own. A follower that
directly follows the rows of its URL is in its place already. `gather` is skipped where nothing moves. All sorts are
external (`ingest.external_sort`), so a URL or a pair may have any number of rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import WorkFailed
from ingest.external_sort import Ahead, SortedRuns, sorted_order
from ingest.identities import IdentityFile, Ids, IdSet, id_column, identities
from ingest.ledger import PAIRS_SCHEMA, Mark
from ingest.sources import Source, SourceBatch, Values

_IDS_AT_ONCE = 1 << 17
_CHANGED = "the source has changed while it was read; start the run again once it stays as it is"

Flags = np.ndarray[Any, np.dtype[np.bool_]]
Positions = np.ndarray[Any, np.dtype[np.int64]]


@dataclass
class Arrangement:
    """One arrangement of one source. `kept` are sorted runs of the source's rows to keep (column `row`); None: all."""

    source: Source
    scratch: Path
    ids: IdentityFile
    removed: IdSet
    kept: SortedRuns | None = None
    report: Callable[[dict[str, Any]], None] = lambda _: None
    _moving: bool = field(default=False, init=False)

    def tables(self) -> Iterator[pa.Table]:
        """The rows of `pairs` in order, in tables of any length."""
        events = self._find()
        moving = SortedRuns(self.scratch, "moving", ("first", "position"))
        if self._moving:
            for table, _, moves in self._rows(events):
                moving.add(table.filter(pa.array(moves)))
        movers = Ahead(moving.sorted(), "first") if moving.rows else None
        for table, settled, moves in self._rows(events):
            heads = table.filter(pa.array(~moves)) if moving.rows else table
            for piece in movers.pieces(settled) if movers is not None else ():
                last = piece["first"][piece.num_rows - 1].as_py()
                # Heads up to the URL that the piece ends in: its own rows in place come before those that moved.
                count = int(np.searchsorted(heads["first"].to_numpy(), last, "right"))
                yield _merged(heads.slice(0, count), piece)
                heads = heads.slice(count)
            if heads.num_rows:
                yield heads.select(PAIRS_SCHEMA.names)
        for piece in movers.pieces(np.iinfo(np.int64).max) if movers is not None else ():
            yield piece.select(PAIRS_SCHEMA.names)

    def _find(self) -> SortedRuns:
        """Rows that are duplicates, or follow an earlier row of their URL: where the first is, and whether to move."""
        by_pair = SortedRuns(self.scratch, "by-pair", ("high", "low", "position"))
        by_url = SortedRuns(self.scratch, "by-url", ("high", "low", "position"))
        position = 0
        for ids in self._kept_ids():
            positions = np.arange(position, position + len(ids))
            position += len(ids)
            # A removed row is no duplicate of another: all that have its id are removed.
            stays = ~self.removed.contains(ids[:, 2:])
            by_pair.add(_id_table(ids[stays, 2:], positions[stays]))
            has_url = (ids[:, :2] != ids[:, 2:]).any(axis=1)
            by_url.add(_id_table(ids[has_url, :2], positions[has_url]))
        events = SortedRuns(self.scratch, "events", ("position", "kind"))
        for found in _duplicates(by_pair.sorted()):
            events.add(found)
        by_pair.clear()
        for found in _followers(by_url.sorted()):
            self._moving = self._moving or pc.any(found["moves"]).as_py() is True
            events.add(found)
        by_url.clear()
        return events

    def _kept_ids(self) -> Iterator[Ids]:
        self.ids.rewind()
        kept = None if self.kept is None else Ahead(self.kept.sorted(), "row")
        row = 0
        while len(ids := self.ids.read(_IDS_AT_ONCE)):
            yield ids if kept is None else ids[_kept_mask(kept, row, len(ids))]
            row += len(ids)

    def _rows(self, events: SortedRuns) -> Iterator[tuple[pa.Table, int, Flags]]:
        """The source's kept rows with their keys and marks; up to which key they are all there; which of them move."""
        self.ids.rewind()
        ahead = Ahead(events.sorted(), "position")
        kept = None if self.kept is None else Ahead(self.kept.sorted(), "row")
        row = position = 0
        for batch in self.source.batches():
            ids = self.ids.read(len(batch.captions))
            _check_unchanged(batch, ids)
            mask = None if kept is None else _kept_mask(kept, row, len(ids))
            row += len(ids)
            count = len(ids) if mask is None else int(mask.sum())
            if not count:
                continue
            first = np.arange(position, position + count)
            moves, duplicate = np.zeros(count, bool), np.zeros(count, bool)
            if (found := ahead.below(position + count)) is not None:
                at = found["position"].to_numpy() - position
                follows = found["first"].to_numpy()
                first[at[follows >= 0]] = follows[follows >= 0]
                moves[at] |= found["moves"].to_numpy()
                duplicate[at[follows < 0]] = True
            table = _pairs_table(batch, ids, mask, duplicate, self.removed)
            positions = pa.array(np.arange(position, position + count))
            position += count
            # The URL that the batch ends in may go on in the next one, before the rows that move to it.
            settled = position if moves[-1] else int(first[-1])
            yield table.append_column("first", pa.array(first)).append_column("position", positions), settled, moves
        if len(self.ids.read(1)):
            raise WorkFailed(_CHANGED)


def _check_unchanged(batch: SourceBatch, ids: Ids) -> None:
    """The source is read more than once. A row of each batch tells whether it is still the same."""
    first = identities(_listed(batch.urls[:1]), _listed(batch.captions[:1]))
    if len(ids) != len(batch.captions) or not np.array_equal(first, ids[:1]):
        raise WorkFailed(f"{_CHANGED} (seen at row {batch.first_row} of {batch.source_file or 'the folder'})")


def hash_rows(source: Source, ids: IdentityFile, report: Callable[[dict[str, Any]], None] = lambda _: None) -> int:
    """The first pass: ids of all rows. → rows."""
    rows = 0
    for batch in source.batches():
        ids.append(identities(_listed(batch.urls), _listed(batch.captions)))
        rows += len(batch.captions)
        report({"shards": 0, "rows": 0, "duplicates": 0, "hashed": rows})
    return rows


def _duplicates(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Sorted by pair, position → an event for every row that has the id of the row before it."""
    last: tuple[int, int] | None = None
    for table in tables:
        high, low, positions = (table[name].to_numpy() for name in ("high", "low", "position"))
        again = ~_starts(high, low, last)
        last = (int(high[-1]), int(low[-1]))
        yield _events(positions[again], np.full(int(again.sum()), -1), np.zeros(int(again.sum()), bool))


def _followers(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Sorted by URL, position → an event for every row that is not its URL's first."""
    last: tuple[int, int] | None = None
    last_first = last_count = 0
    for table in tables:
        high, low, positions = (table[name].to_numpy() for name in ("high", "low", "position"))
        starts = _starts(high, low, last)
        begins = np.flatnonzero(starts)
        group = np.cumsum(starts)  # 0: the group that the table before ended in
        first = np.concatenate(([last_first], positions[begins]))[group]
        rank = np.arange(len(high)) - np.concatenate(([-last_count], begins))[group]
        last = (int(high[-1]), int(low[-1]))
        last_first, last_count = int(first[-1]), int(rank[-1]) + 1
        follows = rank > 0
        yield _events(positions[follows], first[follows], (positions - first != rank)[follows])


def _starts(high: Ids, low: Ids, last: tuple[int, int] | None) -> Flags:
    starts = np.ones(len(high), bool)
    starts[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    starts[0] = last != (int(high[0]), int(low[0]))
    return starts


def _events(positions: Positions, first: Positions, moves: Flags) -> pa.Table:
    """`kind` tells a row's two events apart: a duplicate has no `first` (-1)."""
    kind = (first >= 0).astype(np.int8)
    return pa.table({"position": positions, "kind": kind, "first": first, "moves": moves})


def _id_table(ids: Ids, positions: Positions) -> pa.Table:
    return pa.table(
        {
            "high": pa.array(np.ascontiguousarray(ids[:, 0])),
            "low": pa.array(np.ascontiguousarray(ids[:, 1])),
            "position": pa.array(positions),
        }
    )


def _kept_mask(kept: Ahead, row: int, count: int) -> Flags:
    mask = np.zeros(count, bool)
    if (found := kept.below(row + count)) is not None:
        mask[found["row"].to_numpy() - row] = True
    return mask


def _merged(heads: pa.Table, movers: pa.Table) -> pa.Table:
    table = pa.concat_tables([heads, movers.select(heads.column_names)]).combine_chunks()
    order = sorted_order([table["first"].to_numpy(), table["position"].to_numpy()])
    return table.take(pa.array(order)).select(PAIRS_SCHEMA.names)


def _pairs_table(batch: SourceBatch, ids: Ids, kept: Flags | None, duplicate: Flags, removed: IdSet) -> pa.Table:
    urls, captions = _array(batch.urls), _array(batch.captions)
    rows = pa.array(np.arange(batch.first_row, batch.first_row + len(ids)))
    nowhere = pa.nulls(len(ids), pa.int64())
    offsets = nowhere if batch.offsets is None else pa.array(batch.offsets, pa.int64())
    lengths = nowhere if batch.lengths is None else pa.array(batch.lengths, pa.int64())
    if kept is not None:
        mask = pa.array(kept)
        urls, captions, rows, offsets, lengths = (a.filter(mask) for a in (urls, captions, rows, offsets, lengths))
        ids = ids[kept]
    gone = removed.contains(ids[:, 2:])
    if gone.any():
        urls, captions, offsets, lengths = (
            pc.if_else(pa.array(gone), pa.scalar(None, a.type), a) for a in (urls, captions, offsets, lengths)
        )
    url_text, url_bytes = _text_or_bytes(urls)
    caption_text, caption_bytes = _text_or_bytes(captions)
    columns = {
        "source_file": pa.repeat(pa.scalar(batch.source_file), len(ids)),
        "source_row": rows,
        "pair_id": id_column(ids[:, 2:]),
        "url": url_text,
        "caption": caption_text,
        "url_bytes": url_bytes,
        "caption_bytes": caption_bytes,
        "mark": _marks(duplicate, gone),
        "stored_offset": offsets,
        "stored_length": lengths,
    }
    return pa.table(columns, schema=PAIRS_SCHEMA)


def _marks(duplicate: Flags, removed: Flags) -> pa.Array:
    if not (duplicate.any() or removed.any()):
        return pa.nulls(len(duplicate), pa.string())
    marks = np.where(removed, str(Mark.REMOVED), str(Mark.DUPLICATE))
    return pa.array(marks, pa.string(), mask=~(duplicate | removed))


def _text_or_bytes(values: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Each value in exactly one of two columns: as text where it is UTF-8, else as its bytes."""
    try:
        return values.cast(pa.string()), pa.nulls(len(values), pa.binary())
    except pa.ArrowInvalid:
        pass
    texts: list[str | None] = []
    raw: list[bytes | None] = []
    for value in values.to_pylist():
        try:
            texts.append(None if value is None else value.decode("utf-8"))
            raw.append(None)
        except UnicodeDecodeError:
            texts.append(None)
            raw.append(value)
    return pa.array(texts, pa.string()), pa.array(raw, pa.binary())


def _listed(values: Values) -> list[bytes | None]:
    return values.to_pylist() if isinstance(values, pa.Array) else list(values)


def _array(values: Values) -> pa.Array:
    return values if isinstance(values, pa.Array) else pa.array(values, pa.large_binary())
