"""The ledger: one row for every row of the `pairs` shard, each in exactly one terminal state.

Its words (`Status`, and what a `reason` may be) are in `ingest.outcome`.
"""

from collections import Counter
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa

from ingest.outcome import Outcome

PAIR_COLUMNS = (
    pa.field("source_file", pa.string(), nullable=False),
    pa.field("source_row", pa.int64(), nullable=False),
    pa.field("pair_id", pa.binary(16), nullable=False),
)
TEXT_COLUMNS = (
    pa.field("url", pa.string()),
    pa.field("caption", pa.string()),
    pa.field("url_bytes", pa.binary()),
    pa.field("caption_bytes", pa.binary()),
)
PAIRS_SCHEMA = pa.schema(
    [
        *PAIR_COLUMNS,
        *TEXT_COLUMNS,
        pa.field("mark", pa.string()),
        pa.field("stored_offset", pa.int64()),
        pa.field("stored_length", pa.int64()),
    ]
)
LEDGER_SCHEMA = pa.schema(
    [
        *PAIR_COLUMNS,
        pa.field("key", pa.string(), nullable=False),
        *TEXT_COLUMNS,
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("image_sha256", pa.string()),
        pa.field("stored_sha256", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("original_width", pa.int32()),
        pa.field("original_height", pa.int32()),
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
    ]
)


class Mark(StrEnum):
    """Why a row of `pairs` is not fetched. A removed row keeps its `pair_id` and place; url and caption are erased."""

    DUPLICATE = "duplicate"
    REMOVED = "removed"


def row_key(shard: int, row: int, shard_rows: int) -> str:
    """img2dataset's key: the shard's number, then the row's, each zero-padded so that keys sort as rows do."""
    return f"{shard:05d}{row:0{max(4, len(str(shard_rows - 1)))}d}"


def ledger_table(pairs: pa.Table, keys: list[str], outcomes: list[Outcome]) -> pa.Table:
    """The shard's ledger, in the order of `pairs`: rows in are rows out."""
    assert pairs.num_rows == len(keys) == len(outcomes), "the ledger has as many rows as the pairs shard"
    arrays = []
    for column in LEDGER_SCHEMA:
        if column.name in pairs.column_names:
            arrays.append(pairs[column.name].combine_chunks().cast(column.type))
        else:
            values = keys if column.name == "key" else [getattr(outcome, column.name) for outcome in outcomes]
            arrays.append(_column(values, column.type))
    return pa.Table.from_arrays(arrays, schema=LEDGER_SCHEMA)


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    """What `pa.array` makes of strings or integers, some of them None. That one imports pandas where it is installed:
    a third of a second and 60 MB of every worker."""
    known = np.fromiter((value is not None for value in values), np.bool_, len(values))
    buffers = [pa.py_buffer(np.packbits(known, bitorder="little"))]
    if kind == pa.string():
        texts = [(value or "").encode() for value in values]
        ends = np.cumsum([0, *map(len, texts)], dtype=np.int32)
        buffers += [pa.py_buffer(ends), pa.py_buffer(b"".join(texts))]
    else:
        buffers.append(pa.py_buffer(np.array([value or 0 for value in values], kind.to_pandas_dtype())))
    return pa.Array.from_buffers(kind, len(values), buffers)


def count_outcomes(outcomes: list[Outcome]) -> tuple[dict[str, int], dict[str, int]]:
    """Rows by status, and by `status/reason`."""
    statuses = Counter(str(outcome.status) for outcome in outcomes)
    reasons = Counter(f"{outcome.status}/{outcome.reason}" for outcome in outcomes if outcome.reason is not None)
    return dict(sorted(statuses.items())), dict(sorted(reasons.items()))
