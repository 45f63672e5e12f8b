"""Pixels of training pictures: out of the tar by offset, decoded, brought to the model's size, kept in memory.

The ledger says where a member's data lies, so a picture is one `pread`. JPEGs are decoded at the smallest of libjpeg's
scales (1/1 … 1/8) that is not below the wanted size. A picture is cut to its centre square and averaged down (box
filter), as the diffusion models want it; a CLIP gets its own preprocessing, to the bit what it will see when frozen.
"""

import io
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray
from PIL import Image

from cluster.errors import WorkFailed

OPEN_FILES = 64


class TarReader:
    """Random access to the members of many tar files, with few of them open at a time."""

    def __init__(self, path_of: Callable[[int], Path]) -> None:
        self._path_of = path_of
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, shard: int, offset: int, length: int) -> bytes:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            self._open[shard] = os.open(self._path_of(shard), os.O_RDONLY)
            if len(self._open) > OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        data = os.pread(self._open[shard], length, offset)
        if len(data) != length:
            raise WorkFailed(
                f"{self._path_of(shard)} ends before byte {offset + length}, where its ledger places a picture; "
                "run `unclip verify` on the images"
            )
        return data

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


class RowCache:
    """Arrays of equal shape by row number: computed once, then kept for the rows that fit into `limit_bytes`.

    The rows that fit are the first ones, for good: with every row read once an epoch, evicting the oldest would evict
    just what is needed next. Memory is taken as rows come (untouched pages of the array cost nothing).
    """

    def __init__(self, rows: int, shape: tuple[int, ...], dtype: DTypeLike, limit_bytes: int) -> None:
        row_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        kept = min(rows, limit_bytes // row_bytes)
        self._shape, self._dtype = shape, dtype
        self._values = np.empty((kept, *shape), dtype=dtype)
        self._known = np.zeros(kept, dtype=np.bool_)

    def take(self, rows: NDArray[np.int64], compute: Callable[[int], NDArray[np.generic]]) -> NDArray[np.generic]:
        """The arrays of `rows`, (len(rows), *shape)."""
        taken = np.empty((len(rows), *self._shape), dtype=self._dtype)
        for index, row in enumerate(rows.tolist()):
            if row < len(self._known) and self._known[row]:
                taken[index] = self._values[row]
                continue
            taken[index] = compute(row)
            if row < len(self._known):
                self._values[row] = taken[index]
                self._known[row] = True
        return taken


def decode_square(data: bytes, size: int) -> NDArray[np.uint8]:
    """A stored picture as its centre square at `size` pixels, (size, size, 3)."""
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (size, size))
        picture = image.convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    box = (left, top, left + side, top + side)
    if side == size:
        return np.asarray(picture.crop(box))
    # Averaging is for shrinking; a picture that is too small would come out in squares.
    resampling = Image.Resampling.BOX if side > size else Image.Resampling.BICUBIC
    return np.asarray(picture.resize((size, size), resampling, box=box))


def decode(data: bytes) -> Image.Image:
    """A stored picture at its own size."""
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")
