"""The rows of an images shard that get an embedding: `ok` in the ledger, in its order, with their place in the tar."""

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from cluster.artifact import Artifact
from cluster.errors import WorkFailed

COLUMNS = ["pair_id", "key", "url", "caption", "caption_bytes", "stored_sha256", "status", "offset", "length"]
COLUMNS += ["source_file"]


@dataclass(frozen=True)
class StoredRow:
    """One stored picture and its caption."""

    pair_id: bytes
    key: str
    url: str | None
    source_file: str
    caption: str | None
    caption_bytes: bytes | None
    stored_sha256: str
    offset: int
    length: int

    @property
    def text(self) -> str:
        """What the tokenizer gets: a missing caption is empty, bytes that are not UTF-8 are replaced."""
        if self.caption is not None:
            return self.caption
        return (self.caption_bytes or b"").decode("utf-8", errors="replace")

    @property
    def caption_sha256(self) -> str:
        data = self.caption.encode() if self.caption is not None else self.caption_bytes or b""
        return hashlib.sha256(data).hexdigest()


def stored_rows(images: Artifact, shard: int) -> list[StoredRow]:
    """The `ok` rows of a shard's ledger, in order."""
    table = pq.read_table(images.file(f"{shard:08d}.parquet"), columns=COLUMNS)
    rows: list[dict[str, Any]] = table.to_pylist()
    return [
        StoredRow(**{name: value for name, value in row.items() if name != "status"})
        for row in rows
        if row["status"] == "ok"
    ]


class StoredPictures:
    """The pictures of a shard's tar, each read by its offset. Safe to use from several threads at once."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    def read(self, row: StoredRow) -> Image.Image:
        """The decoded picture. Raises `WorkFailed` where the bytes are not those that the ledger knows."""
        data = os.pread(self._descriptor, row.length, row.offset)
        if hashlib.sha256(data).hexdigest() != row.stored_sha256:
            raise WorkFailed(
                f"{self._path} does not hold at offset {row.offset} the {row.length} bytes that the ledger has for "
                f"{row.key}; run `unclip verify` on the images artifact"
            )
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise WorkFailed(f"{self._path} holds a picture for {row.key} that cannot be decoded: {error}") from error
        return image


@contextmanager
def open_pictures(images: Artifact, shard: int) -> Iterator[StoredPictures]:
    path = images.file(f"{shard:08d}.tar")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield StoredPictures(path, descriptor)
    finally:
        os.close(descriptor)
