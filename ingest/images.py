"""`images`: a shard of pairs → a webdataset tar and its ledger.

    rows ──► fetch (hundreds in flight, one event loop) ──► decode (a few threads) ──► tar and ledger, in row order

Rows end in any order and are written in theirs: what came early waits in memory for its turn. Nothing that a row does
can fail the shard; every row ends in exactly one state.
"""

import asyncio
import json
import logging
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.artifact import Artifact
from cluster.parquet import write_table
from cluster.storage import Folder
from cluster.workshop import Workshop
from ingest.config import ImagesConfig
from ingest.decode import Decoded, decode
from ingest.decode_config import FiltersConfig
from ingest.fetch import Fetched, Fetcher
from ingest.ledger import Mark, Outcome, Status, count_outcomes, ledger_table, row_key
from ingest.tar import DeterministicTar

log = logging.getLogger(__name__)

Fetch = Callable[[str], Awaitable[Fetched]]


class ImagesWorker:
    """Turns shards of `pairs` into shards of `images`.

    kwargs   the fields of `ImagesConfig`
    task     shard, pairs (URI of the pairs artifact), out (a `Workshop`), and folder (URI) where the pairs name files
             of an evaluation set's folder instead of URLs
    """

    def __init__(self, **settings: Any) -> None:
        self._config = ImagesConfig.model_validate(settings)

    def setup(self) -> None:
        # Pillow warns about metadata that it cannot read; what a picture's row says is in the ledger.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        self._threads = ThreadPoolExecutor(self._config.decode_processes, thread_name_prefix="decode")

    def process(self, task: dict[str, Any]) -> dict[str, Any]:
        started = time.monotonic()
        shard, workshop = int(task["shard"]), Workshop.from_plain(task["out"])
        pairs = pq.read_table(Artifact.open(task["pairs"]).file(f"{shard:08d}.parquet"))
        with workshop.attempt(shard) as attempt:
            with attempt.path(f"{shard:08d}.tar").open("wb", buffering=1 << 20) as file, DeterministicTar(file) as tar:
                job = _Shard(shard, pairs, self._config, self._threads, tar)
                asyncio.run(job.run(task.get("folder")))
                stored_bytes = file.tell()
            write_table(attempt.path(f"{shard:08d}.parquet"), ledger_table(pairs, job.keys, list(job.outcomes)))
            counts, reasons = count_outcomes([outcome for outcome in job.outcomes if outcome is not None])
            seconds = time.monotonic() - started
            stats = {
                "seconds": seconds,
                "reasons": reasons,
                "fetched_bytes": job.fetched_bytes,
                "attempts": job.attempts,
            }
            attempt.commit(rows=pairs.num_rows, counts=counts, stats=stats)
        return {
            "shard": shard,
            "rows": pairs.num_rows,
            "counts": counts,
            "reasons": reasons,
            "seconds": seconds,
            "bytes": stored_bytes,
            "fetched_bytes": job.fetched_bytes,
        }


class _Shard:
    """The rows of one shard on their way."""

    def __init__(
        self, shard: int, pairs: pa.Table, config: ImagesConfig, threads: ThreadPoolExecutor, tar: DeterministicTar
    ) -> None:
        self._config = config
        self._threads = threads
        self._tar = tar
        self._rows: list[dict[str, Any]] = pairs.to_pylist()
        self._waiting: dict[int, Decoded] = {}
        self._next_to_write = 0
        self.keys = [row_key(shard, row, config.shard_rows) for row in range(pairs.num_rows)]
        self.outcomes: list[Outcome | None] = [None] * pairs.num_rows
        self.fetched_bytes = 0
        self.attempts = 0

    async def run(self, folder: str | None) -> None:
        rows = iter(range(len(self._rows)))
        consumers = min(self._config.concurrency, len(self._rows))
        if folder is not None:
            fetch = _folder_reader(Folder(folder), self._config)
            await asyncio.gather(*(self._consume(rows, fetch) for _ in range(consumers)))
        else:
            async with Fetcher(self._config) as fetcher:
                await asyncio.gather(*(self._consume(rows, fetcher.fetch) for _ in range(consumers)))
        assert not self._waiting, "every row before a waiting one has ended"

    async def _consume(self, rows: Iterator[int], fetch: Fetch) -> None:
        for row in rows:
            try:
                self._waiting[row] = await self._ended(self._rows[row], fetch)
            except Exception:
                # A defect of ours must not cost the other rows of the shard; it is counted under a reason of its own.
                log.exception("row %s of the shard failed unexpectedly", self.keys[row])
                self._waiting[row] = Decoded(None, Outcome(Status.FETCH_FAILED, "internal_error"))
            self._write_ready()

    async def _ended(self, row: dict[str, Any], fetch: Fetch) -> Decoded:
        early = _early_outcome(row, self._config.filters)
        if early is not None:
            return Decoded(None, early)
        fetched = await fetch(row["url"])
        self.attempts += fetched.attempts
        if fetched.body is None:
            return Decoded(None, Outcome(fetched.status, fetched.reason))
        self.fetched_bytes += len(fetched.body)
        return await asyncio.get_running_loop().run_in_executor(self._threads, decode, fetched.body, self._config)

    def _write_ready(self) -> None:
        while (decoded := self._waiting.pop(self._next_to_write, None)) is not None:
            row = self._next_to_write
            self.outcomes[row] = decoded.outcome if decoded.data is None else self._written(row, decoded)
            self._next_to_write += 1

    def _written(self, row: int, decoded: Decoded) -> Outcome:
        assert decoded.data is not None
        key, pair, outcome = self.keys[row], self._rows[row], decoded.outcome
        offset = self._tar.add(f"{key}.{self._config.format}", decoded.data)
        self._tar.add(f"{key}.txt", pair["caption"].encode())
        member = {
            "caption": pair["caption"],
            "url": pair["url"],
            "key": key,
            "status": "success",  # img2dataset's word
            "error_message": None,
            "width": outcome.width,
            "height": outcome.height,
            "original_width": outcome.original_width,
            "original_height": outcome.original_height,
            "sha256": outcome.image_sha256,
        }
        self._tar.add(f"{key}.json", json.dumps(member, ensure_ascii=False, indent=4).encode())
        return replace(outcome, offset=offset, length=len(decoded.data))


def _early_outcome(row: dict[str, Any], filters: FiltersConfig) -> Outcome | None:
    """How a row ends that needs no fetch, or None. A pair without a caption trains nothing: that is no filter."""
    if row["mark"] == Mark.DUPLICATE:
        return Outcome(Status.DUPLICATE)
    if row["url"] is None:
        return Outcome(Status.REFUSED, "url_missing" if row["url_bytes"] is None else "url_not_utf8")
    caption = row["caption"]
    if caption is None:
        return Outcome(Status.FILTERED, "caption_missing" if row["caption_bytes"] is None else "caption_not_utf8")
    if filters.min_caption_characters is not None and len(caption) < filters.min_caption_characters:
        return Outcome(Status.FILTERED, "caption_too_short")
    if filters.max_caption_characters is not None and len(caption) > filters.max_caption_characters:
        return Outcome(Status.FILTERED, "caption_too_long")
    return None


def _folder_reader(folder: Folder, config: ImagesConfig) -> Fetch:
    async def read(name: str) -> Fetched:
        def load() -> Fetched:
            try:
                if folder.size(name) > config.max_bytes:
                    return Fetched(None, Status.REFUSED, "body_too_large")
                return Fetched(folder.read(name))
            except OSError:
                return Fetched(None, Status.FETCH_FAILED, "file_unreadable")

        return await asyncio.to_thread(load)

    return read
