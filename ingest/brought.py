"""Pictures that a source brings along: read where they lie instead of fetched from their URLs.

    tars      bytes stored_offset … stored_length of the tar `source_file`
    column    row `source_row` of a column of the Parquet `source_file`, where the caption is still the row's
    folder    the file that the row's URL names

Remote files are read in ranges. No name in a tar and no URL chooses a path: `source_file` and a folder's names come
from the source's own listing, and whatever does not lead to a file below its root is not read. As with a fetch, nothing
that a picture is raises: a file that is gone or shorter than it was leaves its row `fetch_failed`.
"""

import asyncio
import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import PurePosixPath
from types import TracebackType
from typing import Any, Self

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from ingest.fetch import Fetched
from ingest.fetch_config import FetchConfig
from ingest.outcome import Status
from ingest.picture_column import PictureColumn
from ingest.tar import BLOCK_BYTES
from ingest.tar_members import parse_header

Plain = dict[str, Any]

# Pictures in memory at a time. Reading is not what takes long, and a row group is best read in order.
IN_FLIGHT = 16
_OPEN_FILES = 4


class NotThere(Exception):
    """The source has no such picture, or no longer."""


class BroughtPictures(ABC):
    """An async context manager with `fetched(row)` for rows of `pairs`, any number at a time."""

    def __init__(self, root: str, config: FetchConfig) -> None:
        self._fs, path = fsspec.core.url_to_fs(root)
        self._root = path.rstrip("/")
        self._local = isinstance(self._fs, LocalFileSystem)
        self._max_bytes = config.max_bytes

    async def __aenter__(self) -> Self:
        self._slots = asyncio.Semaphore(IN_FLIGHT)
        self._threads = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="brought")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self._threads.shutdown)
        self.close()

    @asynccontextmanager
    async def fetched(self, row: Plain) -> AsyncIterator[Fetched]:
        """The picture's bytes; they count against `IN_FLIGHT` until the block ends."""
        async with self._slots:
            yield await asyncio.get_running_loop().run_in_executor(self._threads, self._fetched, row)

    def _fetched(self, row: Plain) -> Fetched:
        try:
            body = self.read(row)
        except TooLarge:
            return Fetched(None, Status.REFUSED, "body_too_large")
        except (NotThere, OSError, EOFError, ValueError, pa.ArrowException):
            return Fetched(None, Status.FETCH_FAILED, "file_unreadable")
        except Exception:
            # Each remote filesystem's package has errors of its own; anything else is a defect of ours.
            if self._local:
                raise
            return Fetched(None, Status.FETCH_FAILED, "file_unreadable")
        return Fetched(body) if body else Fetched(None, Status.FETCH_FAILED, "empty_body")

    @abstractmethod
    def read(self, row: Plain) -> bytes: ...

    def close(self) -> None:  # noqa: B027, only one kind keeps files open
        """Let go of open files."""

    def path(self, name: Any) -> str:
        """The path of a file below the root. Raises `NotThere` for a name that is not spelled as a listing would."""
        if not isinstance(name, str) or not name or "\0" in name:
            raise NotThere(name)
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or str(pure) != name:
            raise NotThere(name)
        path = f"{self._root}/{name}"
        # A pipe or a device in a file's place would hold its reader for ever.
        if self._local and not os.path.isfile(path):
            raise NotThere(name)
        return path

    def checked_length(self, length: int) -> int:
        if length > self._max_bytes:
            raise TooLarge
        return length


class TooLarge(Exception):
    """More bytes than a picture may have."""


class TarPictures(BroughtPictures):
    def read(self, row: Plain) -> bytes:
        offset, length = row["stored_offset"], row["stored_length"]
        if offset is None or length is None or offset < BLOCK_BYTES or length < 0:
            raise NotThere
        start, end = offset - BLOCK_BYTES, offset + self.checked_length(length)
        data: bytes = self._fs.cat_file(self.path(row["source_file"]), start=start, end=end)
        # The header before it tells whether this is still the tar that was listed.
        header = parse_header(data[:BLOCK_BYTES])
        if header is None or header.size != length or len(data) != BLOCK_BYTES + length:
            raise NotThere
        return data[BLOCK_BYTES:]


class FolderPictures(BroughtPictures):
    def read(self, row: Plain) -> bytes:
        with self._fs.open(self.path(row["url"]), "rb") as file:
            # One byte more tells a file that is too large, or that grows as it is read.
            data: bytes = file.read(self._max_bytes + 1)
        self.checked_length(len(data))
        return data


class ColumnPictures(BroughtPictures):
    """Rows come about in order, so files stay open, and each is read on from where it is."""

    def __init__(self, root: str, config: FetchConfig, column: str, caption_column: str) -> None:
        super().__init__(root, config)
        self._columns = (column, caption_column)
        self._open: OrderedDict[str, PictureColumn] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, row: Plain) -> bytes:
        path = self.path(row["source_file"])
        with self._lock:
            if path not in self._open:
                self._open[path] = PictureColumn(self._fs, path, *self._columns)
                if len(self._open) > _OPEN_FILES:
                    self._open.popitem(last=False)[1].close()
            self._open.move_to_end(path)
            found = self._open[path].row(int(row["source_row"]))
            caption = row["caption_bytes"] if row["caption"] is None else row["caption"].encode()
            # A later snapshot may have another picture in the place of this one.
            if found.picture is None or found.caption != caption:
                raise NotThere
            self.checked_length(found.picture.size)
            return bytes(found.picture)

    def close(self) -> None:
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()


def brought_pictures(plain: Plain, config: FetchConfig) -> BroughtPictures:
    """The reader for what `Source.pictures()` describes."""
    kind, root = plain["kind"], plain["root"]
    if kind == "tars":
        return TarPictures(root, config)
    if kind == "folder":
        return FolderPictures(root, config)
    assert kind == "column", kind
    return ColumnPictures(root, config, plain["column"], plain["caption_column"])
