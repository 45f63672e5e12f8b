"""Is an embedding cache what it says it is? Findings as data; none means clean.

    encoder    the cache names the encoder identity that the given CLIP and settings have
    rows       every `ok` ledger row once, in order, with the hashes of its picture and caption
    values     finite, of unit length, norms positive, no dimension constant over the whole cache
    sample     whole batches encoded again, as the stage did it, and compared
    shift      a row encoded again is nearest to its own cached vector, not to another row's

Bytes against receipts is the artifact's own check; these find what was wrong before the receipt was written.

Shapes: N rows, D embedding dimension.
"""

import socket
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.artifact import Artifact
from cluster.environment import environment_digest
from cluster.errors import UnclipError
from embed.cache import VECTOR_COLUMNS, EmbeddingCache, open_cache
from embed.clip import ClipEncoder, best_device, load_encoder
from embed.config import EmbeddingsConfig
from embed.description import encoder_digest
from embed.encode import encode_rows
from embed.stored_rows import StoredRow, open_pictures, stored_rows

# Largest difference of an element of a unit vector that another machine or library version may cause.
TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 1e-2}
UNIT_TOLERANCE = 2e-3  # float16 rounding moves a norm by up to 5e-4
CONSTANT_ROWS = 8  # below this many rows a dimension may be constant by chance


@dataclass(frozen=True)
class Finding:
    """Something wrong. `row` counts within the shard; both are null where it is about the whole."""

    check: str
    detail: str
    shard: int | None = None
    row: int | None = None
    key: str | None = None


def verify_embeddings(
    embeddings_uri: str,
    images_uri: str,
    clip_uri: str,
    config: EmbeddingsConfig,
    *,
    sample: int | None = 256,
    seed: int = 0,
    tolerance: float | None = None,
) -> list[Finding]:
    """Every finding. `sample` is how many rows at least are encoded again (None: all).

    Without a `tolerance`, a shard that this host made with these library versions must be equal to the last bit, and
    any other within `TOLERANCE` of its precision.
    """
    cache, images = open_cache(embeddings_uri), Artifact.open(images_uri)
    encoder = load_encoder(clip_uri, precision=config.precision, device=best_device(config.threads))
    findings: list[Finding] = []
    if cache.shard_count != images.shard_count:
        return [Finding("rows", f"{cache.shard_count} shards for {images.shard_count} of images")]
    expected = encoder_digest(encoder.description, config)
    if cache.shard_count and cache.encoder != expected:
        found = f"made by the encoder {cache.encoder[:12]}…, and the given CLIP and settings are {expected[:12]}…"
        findings.append(Finding("encoder", found))
    if cache.shard_count and cache.dimension != encoder.dimension:
        return [*findings, Finding("encoder", f"{cache.dimension} dimensions, and the CLIP makes {encoder.dimension}")]
    broken: set[int] = set()
    spread = {column: Spread(cache.dimension) for column in VECTOR_COLUMNS} if cache.shard_count else {}
    for shard in range(cache.shard_count):
        here = [*_rows(cache, stored_rows(images, shard), shard), *_values(cache, shard, spread)]
        findings += here
        if any(finding.check == "rows" for finding in here):
            broken.add(shard)
    for column, seen in spread.items():
        findings += seen.findings(column)
    for shard, starts in _chosen_batches(cache, config.batch_size, sample, seed):
        if shard not in broken:  # rows that are not the ledger's cannot be compared with its pictures
            limit = _tolerance(cache, shard, config) if tolerance is None else tolerance
            findings += _encoded_again(cache, images, encoder, config, shard, starts, limit)
    return findings


class Spread:
    """Smallest and largest value of every dimension so far."""

    def __init__(self, dimension: int) -> None:
        self.rows = 0
        self.low_D = np.full(dimension, np.inf)
        self.high_D = np.full(dimension, -np.inf)

    def add(self, vectors_ND: NDArray[np.float32]) -> None:
        if len(vectors_ND):
            self.rows += len(vectors_ND)
            self.low_D = np.fmin(self.low_D, vectors_ND.min(axis=0))
            self.high_D = np.fmax(self.high_D, vectors_ND.max(axis=0))

    def findings(self, column: str) -> list[Finding]:
        constant = np.flatnonzero(self.low_D == self.high_D)
        if self.rows < CONSTANT_ROWS or not constant.size:
            return []
        return [Finding("values", f"{column}: dimension {constant[0]} is constant ({constant.size} such dimensions)")]


def _rows(cache: EmbeddingCache, ledger: list[StoredRow], shard: int) -> Iterator[Finding]:
    table = cache.table(shard, ["pair_id", "key", "caption", "stored_sha256", "caption_sha256"])
    cached_keys, ledger_keys = table.column("key").to_pylist(), [row.key for row in ledger]
    if cached_keys != ledger_keys:
        missing = [key for key in ledger_keys if key not in set(cached_keys)]
        extra = [key for key in cached_keys if key not in set(ledger_keys)]
        doubled = len(cached_keys) - len(set(cached_keys))
        where = next(
            (i for i, pair in enumerate(zip(cached_keys, ledger_keys, strict=False)) if pair[0] != pair[1]), None
        )
        what = f"{len(missing)} ok rows missing, {len(extra)} not in the ledger, {doubled} doubled"
        if not (missing or extra or doubled):
            what = "the ledger's rows in another order"
        key = (missing or extra or [None])[0]
        yield Finding("rows", f"{what}; the first difference is at row {where}", shard, where, key)
        return
    for name in ("pair_id", "caption", "stored_sha256", "caption_sha256"):
        for index, (value, row) in enumerate(zip(table.column(name).to_pylist(), ledger, strict=True)):
            if value != getattr(row, name):
                yield Finding("rows", f"{name} is not the ledger's", shard, index, row.key)


def _values(cache: EmbeddingCache, shard: int, spread: dict[str, Spread]) -> Iterator[Finding]:
    keys = cache.table(shard, ["key"]).column("key").to_pylist()
    for column in VECTOR_COLUMNS:
        vectors_ND = cache.vectors(shard, column).astype(np.float32)
        finite_N: NDArray[np.bool_] = np.asarray(np.isfinite(vectors_ND).all(axis=1))
        length_N = np.linalg.norm(np.where(finite_N[:, None], vectors_ND, 0.0), axis=1)
        spread[column].add(vectors_ND[finite_N])
        for row in np.flatnonzero(~finite_N | (np.abs(length_N - 1.0) > UNIT_TOLERANCE)):
            what = f"has length {length_N[row]:.4f}" if length_N[row] else "is a zero vector"
            what = what if finite_N[row] else "is not finite"
            yield Finding("values", f"{column} {what}", shard, int(row), keys[row])
        name = column.replace("embedding", "norm")
        norm_N = cache.table(shard, [name]).column(name).to_numpy()
        for row in np.flatnonzero(~(np.isfinite(norm_N) & (norm_N > 0.0))):
            yield Finding("values", f"{name} is {norm_N[row]}", shard, int(row), keys[row])


def _chosen_batches(
    cache: EmbeddingCache, batch_size: int, sample: int | None, seed: int
) -> Iterator[tuple[int, list[int]]]:
    """Per shard the first rows of the batches to encode again: whole batches, because those have exact bytes."""
    batches = [
        (shard, start)
        for shard in range(cache.shard_count)
        for start in range(0, int(cache.shard_rows[shard]), batch_size)
    ]
    if sample is not None:
        count = min(len(batches), -(-sample // batch_size))
        batches = sorted(batches[index] for index in np.random.default_rng(seed).permutation(len(batches))[:count])
    for shard in sorted({shard for shard, _ in batches}):
        yield shard, [start for there, start in batches if there == shard]


def _tolerance(cache: EmbeddingCache, shard: int, config: EmbeddingsConfig) -> float:
    receipt = cache.artifact.receipt(shard)
    here = receipt.host == socket.gethostname() and receipt.environment == environment_digest()
    return 0.0 if here else TOLERANCE[config.precision]


def _encoded_again(
    cache: EmbeddingCache,
    images: Artifact,
    encoder: ClipEncoder,
    config: EmbeddingsConfig,
    shard: int,
    starts: list[int],
    tolerance: float,
) -> Iterator[Finding]:
    ledger = stored_rows(images, shard)
    norms = {
        column: cache.table(shard, [name]).column(name).to_numpy()
        for column in VECTOR_COLUMNS
        if (name := column.replace("embedding", "norm"))
    }
    with open_pictures(images, shard) as pictures:
        for start in starts:
            rows = ledger[start : start + config.batch_size]
            try:
                again = encode_rows(encoder, rows, pictures, config)
            except UnclipError as error:
                yield Finding("sample", str(error), shard, start, rows[0].key)
                continue
            for column, vectors_BD, norm_B in (
                ("image_embedding", again.image_ND, again.image_norm_N),
                ("text_embedding", again.text_ND, again.text_norm_N),
            ):
                cached_ND = cache.vectors(shard, column)
                cached_norm_B = norms[column][start : start + len(rows)]
                yield from _compare(column, cached_ND, vectors_BD, start, shard, rows, tolerance)
                for row in np.flatnonzero(~(np.abs(cached_norm_B - norm_B) <= tolerance * norm_B)):
                    detail = f"{column}: the norm is {cached_norm_B[row]:.6g}, encoded again {norm_B[row]:.6g}"
                    yield Finding("sample", detail, shard, start + int(row), rows[row].key)


def _compare(
    column: str,
    cached_ND: NDArray[np.float16],
    again_BD: NDArray[np.float16],
    start: int,
    shard: int,
    rows: list[StoredRow],
    tolerance: float,
) -> Iterator[Finding]:
    own_BD = cached_ND[start : start + len(rows)].astype(np.float32)
    difference_B = np.abs(own_BD - again_BD.astype(np.float32)).max(axis=1)
    wrong = np.flatnonzero(~(difference_B <= tolerance))  # written so that NaN is wrong too
    if not wrong.size:
        return
    all_ND = np.nan_to_num(cached_ND.astype(np.float32))
    for row in wrong:
        similarity_N = all_ND @ again_BD[row].astype(np.float32)
        nearest = int(similarity_N.argmax())
        own = start + int(row)
        if similarity_N[nearest] > similarity_N[own] + TOLERANCE["fp32"]:
            detail = f"{column}: encoded again it is nearest to the cached vector of row {nearest}, not to its own"
            yield Finding("shift", detail, shard, own, rows[row].key)
        else:
            detail = f"{column}: differs by {difference_B[row]:.3g} from encoding it again; {tolerance:.3g} is allowed"
            yield Finding("sample", detail, shard, own, rows[row].key)
