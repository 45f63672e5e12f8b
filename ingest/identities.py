"""What makes a pair the same pair: 128 bits over URL and caption. And of a URL, 128 bits to bring its rows together."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa

Ids = np.ndarray[Any, np.dtype[np.uint64]]  # two numbers an id: its bytes, little-endian

ID_BYTES = 16


def pair_id(url: bytes | None, caption: bytes | None) -> bytes:
    """128 bits of sha256 over both values, each with a null flag and its length: no two pairs are spelled alike."""
    return _url_and_pair_id(url, caption)[1]


def _url_and_pair_id(url: bytes | None, caption: bytes | None) -> tuple[bytes, bytes]:
    digest = hashlib.sha256(b"\0" if url is None else b"\1" + len(url).to_bytes(8, "big") + url)
    url_id = digest.digest()[:ID_BYTES]
    digest.update(b"\0" if caption is None else b"\1" + len(caption).to_bytes(8, "big") + caption)
    return url_id, digest.digest()[:ID_BYTES]


def identities(urls: Sequence[bytes | None], captions: Sequence[bytes | None]) -> Ids:
    """One row each: the URL's id in the first two columns, the pair's in the others; a null URL has the pair's."""
    ids: list[bytes] = []
    for url, caption in zip(urls, captions, strict=True):
        url_id, both = _url_and_pair_id(url, caption)
        ids.append(both if url is None else url_id)
        ids.append(both)
    return np.frombuffer(b"".join(ids), "<u8").reshape(-1, 4)


def id_numbers(column: Any) -> Ids:
    """A column of binary(16) as two numbers a row."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    assert array.type == pa.binary(ID_BYTES) and not array.null_count, array.type
    if not len(array):
        return np.empty((0, 2), "<u8")
    numbers = np.frombuffer(array.buffers()[1], "<u8", count=2 * (array.offset + len(array)))
    return numbers.reshape(-1, 2)[array.offset :]


def id_column(ids: Ids) -> pa.Array:
    """The reverse."""
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(ID_BYTES), len(ids), [None, pa.py_buffer(np.ascontiguousarray(ids).tobytes())]
    )


class IdSet:
    """Pair ids to look up: a sorted column of binary(16). 24 bytes an id in memory."""

    def __init__(self, column: Any = None) -> None:
        ids = np.empty((0, 2), "<u8") if column is None else id_numbers(column)
        self._ids = ids[np.lexsort((ids[:, 1], ids[:, 0]))]

    def contains(self, ids: Ids) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        found = np.zeros(len(ids), bool)
        if not len(self._ids):
            return found
        first = np.searchsorted(self._ids[:, 0], ids[:, 0])
        near = np.flatnonzero(self._ids[np.minimum(first, len(self._ids) - 1), 0] == ids[:, 0])
        for row in near:
            place = int(first[row])
            while place < len(self._ids) and self._ids[place, 0] == ids[row, 0] and not found[row]:
                found[row] = self._ids[place, 1] == ids[row, 1]
                place += 1
        return found


class IdentityFile:
    """The ids of a source's rows, in its order, on disk: hashed once, read in every later pass."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Self:
        self._file = self._path.open("w+b", buffering=1 << 20)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._path.unlink()

    def append(self, ids: Ids) -> None:
        self._file.write(ids.tobytes())

    def rewind(self) -> None:
        self._file.seek(0)

    def read(self, rows: int) -> Ids:
        """The next rows; fewer at the end."""
        return np.frombuffer(self._file.read(rows * 2 * ID_BYTES), "<u8").reshape(-1, 4)
