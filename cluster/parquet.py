"""Parquet with fixed writer settings: the same table is the same bytes, whoever writes it."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP_ROWS = 65_536


def write_table(path: str | Path, table: pa.Table, *, compression: str = "zstd") -> None:
    """Write `table` to a local path. Settings are part of the format: changing one changes every content digest.

    `compression="none"` is for columns of high entropy that a reader maps without a copy (embeddings).
    """
    pq.write_table(
        table,
        path,
        version="2.6",
        compression=compression,
        compression_level=3 if compression == "zstd" else None,
        use_dictionary=False,
        write_statistics=True,
        row_group_size=ROW_GROUP_ROWS,
        data_page_version="1.0",
        store_schema=True,
    )
