"""Training rows and their batches.

    rows      which rows train, in order, and where their pixels and vectors lie
                CLIP          ok rows of the images outside the validation split (there is no view yet)
                the others    rows of the view that are in and in the training split
    batches   rows at the places that the lanes name, as tensors, made one step ahead on a thread

A `TrainRows` holds what is small per row (place in the tar, caption, vectors); pictures and tokens are read when first
asked for and kept as far as the memory bound allows, so that the second epoch decodes nothing.

Shapes: B rows of this process, S pixels a side, T tokens, D embedding dimension, W width of the text tower.
"""

import hashlib
import queue
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.artifact import Artifact
from cluster.errors import UserError, WorkFailed
from embed.clip import ClipEncoder, normalize_pixels, resize_and_crop
from embed.config import PreprocessingConfig
from embed.split import TRAIN, is_validation
from embed.tokenizer import Tokenizer
from train.family import Needs
from train.lanes import Lanes
from train.pictures import RowCache, TarReader, decode, decode_square

LEDGER_COLUMNS = ["key", "pair_id", "caption", "caption_bytes", "status", "offset", "length"]
CACHED_TOKEN_BYTES = 256 << 20


@dataclass(frozen=True)
class RowTable:
    """The training rows, in order. Vectors are there for families that need them."""

    images: Artifact
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    pair_id: pa.ChunkedArray
    caption: pa.ChunkedArray
    caption_bytes: pa.ChunkedArray
    image_embedding: NDArray[np.float16] | None = None
    text_embedding: NDArray[np.float16] | None = None
    left_out: int = 0  # ok rows that do not train

    def __len__(self) -> int:
        return len(self.shard)

    def pair_ids(self, rows: Sequence[int]) -> list[str]:
        return [self.pair_id[row].as_py().hex() for row in rows]

    def captions(self, rows: Sequence[int]) -> list[str]:
        """What the tokenizer gets: a missing caption is empty, bytes that are not UTF-8 are replaced."""
        return [
            text if (text := self.caption[row].as_py()) is not None
            else (self.caption_bytes[row].as_py() or b"").decode("utf-8", errors="replace")
            for row in rows
        ]  # fmt: skip

    def sha256(self) -> str:
        """Of the pair ids in order: which rows trained."""
        total = hashlib.sha256()
        for pair_id in self.pair_id:
            total.update(pair_id.as_py())
        return total.hexdigest()


def rows_of_images(images: Artifact, validation_fraction: float) -> RowTable:
    """Rows for CLIP: every ok row outside the validation split."""
    tables, shards, left_out = [], [], 0
    for shard in range(images.shard_count):
        ledger = _ok_rows(images, shard)
        trains = ~is_validation(ledger["pair_id"].to_pylist(), validation_fraction)
        left_out += len(ledger) - int(trains.sum())
        tables.append(ledger.filter(pa.array(trains)))
        shards.append(np.full(int(trains.sum()), shard, dtype=np.int32))
    return _row_table(images, pa.concat_tables(tables), shards, left_out=left_out)


def rows_of_view(view: Artifact, embeddings: Artifact, images: Artifact) -> RowTable:
    """Rows for the models behind CLIP: in the view, and in its training split."""
    tables, shards, vectors, left_out = [], [], [], 0
    for shard in range(view.shard_count):
        seen = pq.read_table(view.file(f"{shard:08d}.parquet"), columns=["row", "included", "split"])
        trains = pc.and_(seen["included"], pc.equal(seen["split"], TRAIN))
        rows = seen["row"].filter(trains)
        left_out += len(seen) - len(rows)
        embedded = pq.read_table(
            embeddings.file(f"{shard:08d}.parquet"), columns=["key", "image_embedding", "text_embedding"]
        ).take(rows)
        ledger = _ok_rows(images, shard)
        place = pc.index_in(embedded["key"], value_set=ledger["key"].combine_chunks())
        if place.null_count:
            raise WorkFailed(
                f"{embeddings.uri} shard {shard} has {place.null_count} rows that are not ok in {images.uri}; "
                "the embeddings are older than the images: run again to bring them up to date"
            )
        tables.append(ledger.take(place))
        shards.append(np.full(len(rows), shard, dtype=np.int32))
        vectors.append((_vectors(embedded["image_embedding"]), _vectors(embedded["text_embedding"])))
    image_ND, text_ND = (np.concatenate(column) for column in zip(*vectors, strict=True))
    table = pa.concat_tables(tables)
    return _row_table(images, table, shards, image_embedding=image_ND, text_embedding=text_ND, left_out=left_out)


class TrainRows:
    """Batches of training rows with the columns that a family needs."""

    def __init__(
        self,
        table: RowTable,
        needs: Needs,
        *,
        tokenizer: Tokenizer | None = None,
        encoder: ClipEncoder | None = None,
        cache_bytes: int = 512 << 20,
    ) -> None:
        self.table = table
        self._needs = needs
        self._encoder = encoder
        self._tokenizer = tokenizer if encoder is None else encoder.tokenizer
        self._tar = TarReader(lambda shard: table.images.file(f"{shard:08d}.tar"))
        if "image" in needs.columns:
            if needs.image_size is None:
                raise UserError("a family that needs pictures must say their image_size")
            size = needs.image_size
            self._pixels = RowCache(len(table), (size, size, 3), np.uint8, cache_bytes)
        if {"tokens", "text_hidden"} & needs.columns:
            if self._tokenizer is None:
                raise UserError("a family that reads captions needs the CLIP whose tokenizer spells them")
            self._tokens = RowCache(len(table), (self._tokenizer.context_length,), np.int32, CACHED_TOKEN_BYTES)

    def __len__(self) -> int:
        return len(self.table)

    def batch(self, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        """The columns of `rows`, in that order, on the CPU."""
        needs, batch = self._needs.columns, {}
        if "image" in needs:
            batch["image"] = to_model_input(self._pixels.take(rows, self._decode), self._needs.preprocessing)
        if {"tokens", "text_hidden"} & needs:
            batch["tokens"] = torch.from_numpy(self._tokens.take(rows, self._tokenize).astype(np.int64))
        if "text_hidden" in needs:
            assert self._encoder is not None, "text_hidden comes from the frozen encoder"
            batch["text_hidden"] = self._encoder.text_hidden(batch["tokens"]).cpu()
        for column, vectors in (
            ("image_embedding", self.table.image_embedding),
            ("text_embedding", self.table.text_embedding),
        ):
            if column in needs:
                assert vectors is not None, "rows of a view carry both vectors"
                batch[column] = torch.from_numpy(vectors[rows].astype(np.float32))
        return batch

    def close(self) -> None:
        self._tar.close()

    def _decode(self, row: int) -> NDArray[np.uint8]:
        table = self.table
        data = self._tar.read(int(table.shard[row]), int(table.offset[row]), int(table.length[row]))
        size = self._needs.image_size
        assert size is not None, "checked when the cache was made"
        if self._needs.preprocessing is not None:
            return resize_and_crop(decode(data), size, self._needs.preprocessing)
        return decode_square(data, size)

    def _tokenize(self, row: int) -> NDArray[np.int64]:
        assert self._tokenizer is not None, "checked when the cache was made"
        tokens_BT, _ = self._tokenizer(self.table.captions([row]))
        tokens_T: NDArray[np.int64] = tokens_BT[0]
        return tokens_T


def to_model_input(pixels: NDArray[Any], preprocessing: PreprocessingConfig | None) -> Tensor:
    """uint8 pixels (B, S, S, 3) to a model's input (B, 3, S, S): in [-1, 1], or as an encoder wants them."""
    pixels_BHWC = torch.from_numpy(pixels)
    if preprocessing is not None:
        return normalize_pixels(pixels_BHWC, preprocessing)
    return (pixels_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 127.5) - 1.0


def prefetch(
    rows: TrainRows, lanes: Lanes, slots: NDArray[np.int64], steps: range, *, ahead: int = 2
) -> Generator[tuple[int, NDArray[np.int64], dict[str, Tensor]], None, None]:
    """(step, rows, batch) of each of `steps` for `slots`, made up to `ahead` steps early on a thread."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=ahead)
    stopped = threading.Event()

    def put(item: Any) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for step in steps:
                at = lanes.at(step, slots).row
                put((step, at, rows.batch(at)))
                if stopped.is_set():
                    return
        except BaseException as error:  # re-raised where the batch is awaited
            put(error)

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        for _ in steps:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


def _ok_rows(images: Artifact, shard: int) -> pa.Table:
    ledger = pq.read_table(images.file(f"{shard:08d}.parquet"), columns=LEDGER_COLUMNS)
    return ledger.filter(pc.equal(ledger["status"], "ok"))


def _row_table(images: Artifact, table: pa.Table, shards: list[NDArray[np.int32]], **vectors: Any) -> RowTable:
    return RowTable(
        images=images,
        shard=np.concatenate(shards),
        offset=table["offset"].to_numpy(),
        length=table["length"].to_numpy(),
        pair_id=table["pair_id"],
        caption=table["caption"],
        caption_bytes=table["caption_bytes"],
        **vectors,
    )


def _vectors(column: pa.ChunkedArray) -> NDArray[np.float16]:
    """A fixed-size-binary column of little-endian float16 as (N, D), without a copy."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0)
    width = array.type.byte_width
    data = np.frombuffer(array.buffers()[1], dtype="<f2")
    return data.reshape(-1, width // 2)[array.offset : array.offset + len(array)]
