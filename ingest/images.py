"""`images`: shards of pairs → webdataset tars and their ledgers.

    rows ──► judge (filters on url and caption) ──► fetch ──► decode ──► tar and ledger, in row order
                      children                       loop     children

One worker has one event loop, one fetcher and some decoding processes for all its shards, and works on several shards
at once: while the last rows of one wait for slow hosts, the next is on its way. What becomes of a shard's rows is told
in `ingest.image_shard`.
"""

import asyncio
import gc
import tempfile
import threading
import time
from contextlib import AsyncExitStack, ExitStack
from typing import Any

import pyarrow.parquet as pq
import uvloop

from cluster.artifact import Artifact
from cluster.parquet import write_table
from cluster.workshop import Workshop
from ingest.brought import brought_pictures
from ingest.children import Children
from ingest.config import ImagesConfig
from ingest.fetch import Fetcher
from ingest.image_shard import Fetch, ImageShard, PublishedShard
from ingest.ledger import count_outcomes, ledger_table
from ingest.limits import Ask
from ingest.tar import DeterministicTar

_FAILING_HOSTS_NAMED = 20


class ImagesWorker:
    """Turns shards of `pairs` into shards of `images`; `process` may be called from several threads at once.

    config    the fields of `ImagesConfig`
    pictures  `Source.pictures()` of a source that brings its pictures along; None where URLs are fetched
    task      shard; pairs (URI of the artifact); out (a `Workshop`); made_from (digest of the pairs shard); retry
              (null: every row is fetched; else rows are taken over from the published shard as they ended there, but
              for the statuses that are listed)
    """

    def __init__(self, config: dict[str, Any], pictures: dict[str, Any] | None = None) -> None:
        self._config = ImagesConfig.model_validate(config)
        self._pictures = pictures

    def setup(self, ask: Ask | None = None) -> None:
        self._loop = uvloop.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="images", daemon=True).start()
        self._open = AsyncExitStack()
        self._on_loop(self._start(ask))
        # Thousands of rows in flight are young objects; walking all that was imported for each few of them costs 15%.
        # What is garbage already is frozen too: a few objects, and 50 ms to look for them.
        gc.freeze()
        gc.set_threshold(100_000, 50, 50)

    async def _start(self, ask: Ask | None) -> None:
        self._children = await self._open.enter_async_context(Children(self._config))
        self._fetch = await self._fetch_of(ask)
        # Rows beyond those in flight stand ready, so that a fair choice among their hosts can be made.
        self._begun = asyncio.Semaphore(4 * self._config.concurrency)

    async def _fetch_of(self, ask: Ask | None) -> Fetch:
        if self._pictures is not None:
            brought = await self._open.enter_async_context(brought_pictures(self._pictures, self._config))
            return brought.fetched
        fetcher = await self._open.enter_async_context(Fetcher(self._config, ask))
        return lambda row: fetcher.fetched(row["url"])

    def close(self) -> None:
        self._on_loop(self._open.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _on_loop(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def process(self, task: dict[str, Any]) -> dict[str, Any]:
        started = time.monotonic()
        shard, workshop = int(task["shard"]), Workshop.from_plain(task["out"])
        with Artifact.open(task["pairs"]).borrowed(f"{shard:08d}.parquet") as path:
            pairs = pq.ParquetFile(path).read()
        with workshop.attempt(shard) as attempt, ExitStack() as open_:
            published = None
            if task["retry"] is not None:
                published = open_.enter_context(PublishedShard(workshop.folder, shard, task["retry"]))
            path = attempt.path(f"{shard:08d}.tar")
            with (
                path.open("wb", buffering=1 << 20) as file,
                tempfile.TemporaryFile(dir=path.parent) as aside,
                DeterministicTar(file) as tar,
            ):
                job = ImageShard(shard, pairs, self._config, tar, aside, published)
                self._on_loop(job.run(self._children, self._fetch, self._begun))
            outcomes = job.ended()
            write_table(attempt.path(f"{shard:08d}.parquet"), ledger_table(pairs, job.keys, outcomes))
            counts, reasons = count_outcomes(outcomes)
            stats = {
                "seconds": time.monotonic() - started,
                "reasons": reasons,
                "failing_hosts": dict(job.failing_hosts.most_common(_FAILING_HOSTS_NAMED)),
                "fetched_bytes": job.fetched_bytes,
                "attempts": job.attempts,
            }
            attempt.commit(rows=pairs.num_rows, counts=counts, stats=stats, made_from=task["made_from"])
        return {"shard": shard, "rows": pairs.num_rows, "counts": counts} | stats
