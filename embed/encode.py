"""The `embeddings` stage: every `ok` row of an images shard through the frozen CLIP, one shard a task.

    ledger ─► rows ─► batches of `batch_size` ─► decode ahead on threads ─► CLIP ─► unit vectors, norms ─► Parquet

The last batch is padded, so every forward has the same shape and a row's bytes do not depend on how many rows its
shard has, nor on which worker got it. Vectors are fixed_size_binary of little-endian float16: pyarrow reads that by
copying pages, and a reader views it as a numpy array (fixed_size_list of float16 is read element by element).

Shapes: B batch, N rows of the shard, D embedding dimension.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from cluster.artifact import Artifact
from cluster.errors import WorkFailed
from cluster.parquet import write_table
from cluster.workshop import Workshop
from embed.clip import ClipEncoder, best_device, load_encoder
from embed.config import EmbeddingsConfig
from embed.description import encoder_digest
from embed.stored_rows import StoredPictures, StoredRow, open_pictures, stored_rows

Float16 = NDArray[np.float16]
Float32 = NDArray[np.float32]


class EmbeddingsWorker:
    """Shard worker. Task: `shard`, `images` (artifact URI), `out` (the embeddings workshop)."""

    def __init__(self, clip: str, config: dict[str, Any]) -> None:
        self._clip = clip
        self._config = EmbeddingsConfig.model_validate(config)

    def setup(self) -> None:
        device = best_device(self._config.threads)
        self._encoder = load_encoder(self._clip, precision=self._config.precision, device=device)

    def process(self, task: dict[str, Any]) -> dict[str, Any]:
        started = time.perf_counter()
        shard = int(task["shard"])
        images = Artifact.open(task["images"])
        rows = stored_rows(images, shard)
        with open_pictures(images, shard) as pictures:
            vectors = encode_rows(self._encoder, rows, pictures, self._config)
        table = embeddings_table(rows, vectors, encoder=encoder_digest(self._encoder.description, self._config))
        counts = {"ok": len(rows), "captions_cut": vectors.captions_cut}
        with Workshop.from_plain(task["out"]).attempt(shard) as attempt:
            write_table(attempt.path(f"{shard:08d}.parquet"), table, compression="none")
            seconds = time.perf_counter() - started
            stats = {"seconds": seconds, "device": str(self._encoder.device), "images_per_s": len(rows) / seconds}
            attempt.commit(rows=len(rows), counts=counts, stats=stats, made_from=task["made_from"])
        return {"shard": shard, "rows": len(rows), "counts": counts, "seconds": seconds}


class Vectors:
    """Unit vectors of rows in float16 with the norms that they had. Raises `WorkFailed` for rows that have none."""

    def __init__(self, rows: Sequence[StoredRow], image_ND: Float32, text_ND: Float32, captions_cut: int) -> None:
        self.image_ND, self.image_norm_N = _unit(rows, image_ND, "image")
        self.text_ND, self.text_norm_N = _unit(rows, text_ND, "text")
        self.captions_cut = captions_cut


def encode_rows(
    encoder: ClipEncoder, rows: Sequence[StoredRow], pictures: StoredPictures, config: EmbeddingsConfig
) -> Vectors:
    """Embeddings of `rows`, which are encoded from the first on in batches of `config.batch_size`."""
    image_embeddings: list[torch.Tensor] = []
    text_embeddings: list[torch.Tensor] = []
    captions_cut = 0
    with torch.inference_mode():
        for batch, pixels_BHWC in _decoded_batches(encoder, rows, pictures, config):
            # Results stay on the device until the end: a copy here would wait for the forward.
            image_embeddings.append(encoder.encode_image(torch.from_numpy(pixels_BHWC))[: len(batch)])
            captions = [row.text for row in batch] + [""] * (config.batch_size - len(batch))
            tokens_BT, cut_B = encoder.tokenize(captions)
            text_embeddings.append(encoder.encode_text(tokens_BT)[: len(batch)])
            captions_cut += int(cut_B.sum())
    empty = torch.zeros(0, encoder.dimension)
    image_ND = torch.cat(image_embeddings).cpu().numpy() if image_embeddings else empty.numpy()
    text_ND = torch.cat(text_embeddings).cpu().numpy() if text_embeddings else empty.numpy()
    return Vectors(rows, image_ND, text_ND, captions_cut)


def embeddings_table(rows: Sequence[StoredRow], vectors: Vectors, *, encoder: str) -> pa.Table:
    """The embeddings shard. `encoder` is the digest of the encoder's identity: vectors of two are never compared."""
    dimension = vectors.image_ND.shape[1]
    columns = {
        "pair_id": pa.array([row.pair_id for row in rows], pa.binary(16)),
        "key": pa.array([row.key for row in rows], pa.string()),
        "caption": pa.array([row.caption for row in rows], pa.string()),
        "stored_sha256": pa.array([row.stored_sha256 for row in rows], pa.string()),
        "caption_sha256": pa.array([row.caption_sha256 for row in rows], pa.string()),
        "image_embedding": _binary(vectors.image_ND),
        "text_embedding": _binary(vectors.text_ND),
        "image_norm": pa.array(vectors.image_norm_N, pa.float32()),
        "text_norm": pa.array(vectors.text_norm_N, pa.float32()),
    }
    return pa.table(columns).replace_schema_metadata({"dimension": str(dimension), "encoder": encoder})


def _decoded_batches(
    encoder: ClipEncoder, rows: Sequence[StoredRow], pictures: StoredPictures, config: EmbeddingsConfig
) -> Iterator[tuple[Sequence[StoredRow], NDArray[np.uint8]]]:
    """Batches in order, each decoded whole by one thread while earlier ones are in the forward."""

    def decode(batch: Sequence[StoredRow]) -> NDArray[np.uint8]:
        size = encoder.image_size
        pixels_BHWC = np.zeros((config.batch_size, size, size, 3), dtype=np.uint8)
        for index, row in enumerate(batch):
            pixels_BHWC[index] = encoder.preprocess(pictures.read(row))
        return pixels_BHWC

    batches = [rows[start : start + config.batch_size] for start in range(0, len(rows), config.batch_size)]
    with ThreadPoolExecutor(config.decode_threads) as executor:
        ahead: deque[tuple[Sequence[StoredRow], Future[NDArray[np.uint8]]]] = deque()
        for batch in batches:
            ahead.append((batch, executor.submit(decode, batch)))
            if len(ahead) > config.decode_threads:
                ready, pixels = ahead.popleft()
                yield ready, pixels.result()
        while ahead:
            ready, pixels = ahead.popleft()
            yield ready, pixels.result()


def _unit(rows: Sequence[StoredRow], raw_ND: Float32, kind: str) -> tuple[Float16, Float32]:
    norm_N = np.sqrt(np.einsum("nd,nd->n", raw_ND, raw_ND, dtype=np.float64))
    broken = np.flatnonzero(~np.isfinite(norm_N) | (norm_N == 0.0))
    if broken.size:
        row = int(broken[0])
        what = "is zero" if norm_N[row] == 0.0 else "is not finite"
        raise WorkFailed(
            f"the {kind} embedding of row {row} (key {rows[row].key}) {what}, and so are {broken.size - 1} others. "
            "fp16 overflows like this: set embeddings.precision to bf16 or fp32. In those the weights are broken."
        )
    return (raw_ND / norm_N[:, None]).astype("<f2"), norm_N.astype(np.float32)


def _binary(vectors_ND: Float16) -> pa.Array:
    """(N, D) float16 as fixed_size_binary(2·D), without a copy."""
    count, dimension = vectors_ND.shape
    buffer = pa.py_buffer(np.ascontiguousarray(vectors_ND))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(2 * dimension), count, [None, buffer])
