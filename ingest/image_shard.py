"""The rows of one shard of images on their way from pair to ledger.

Rows end in any order and are written in theirs: what came early waits for its turn, in memory up to a limit and then in
a file. Nothing that a row does can fail the shard; every row ends in exactly one state. Rows of one URL stand together
and are fetched once.
"""

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from json.encoder import encode_basestring
from typing import IO, Any, Protocol, Self

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.artifact import Artifact
from cluster.errors import UnclipError
from cluster.storage import Folder
from ingest.children import Children
from ingest.config import ImagesConfig
from ingest.fetch import Fetched
from ingest.ledger import Mark, row_key
from ingest.outcome import Decoded, Outcome, Status
from ingest.tar import DeterministicTar

log = logging.getLogger(__name__)

Row = dict[str, Any]
_WAITING_BYTES = 32_000_000


class Fetch(Protocol):
    """Where the bytes of a row come from; the body is accounted for until the block ends."""

    def __call__(self, row: Row) -> AbstractAsyncContextManager[Fetched]: ...


@dataclass(frozen=True, slots=True)
class Ended:
    """How a row ended, and its picture: in memory, put aside in a file, or in the tar that is being amended."""

    outcome: Outcome
    data: bytes | None = None
    descriptor: int | None = None
    offset: int = 0
    length: int = 0

    def picture(self) -> bytes | None:
        if self.descriptor is None:
            return self.data
        return os.pread(self.descriptor, self.length, self.offset)


class PublishedShard:
    """A shard as it is published, for a revision that goes back to some of its rows; one that is new has none."""

    def __init__(self, folder: Folder, shard: int, retry: list[str]) -> None:
        self._artifact = Artifact.open(folder)
        self._names = (f"{shard:08d}.parquet", f"{shard:08d}.tar")
        self._retry = frozenset(retry)
        self._rows: list[Row] = []
        self._open = ExitStack()

    def __enter__(self) -> Self:
        if self._artifact.has(self._names[0]):
            with self._artifact.borrowed(self._names[0]) as ledger:
                self._rows = pq.read_table(ledger).to_pylist()
            tar = self._open.enter_context(self._artifact.borrowed(self._names[1]))
            self._tar = self._open.enter_context(tar.open("rb"))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def ended(self, row: int, pair_id: bytes) -> Ended | None:
        """What is taken over of a row; None where it is tried again, or was another row then."""
        there = self._rows[row] if row < len(self._rows) else None
        if there is None or there["pair_id"] != pair_id or there["status"] in self._retry:
            return None
        names = (name for name in Outcome.__dataclass_fields__ if name not in ("status", "offset", "length"))
        outcome = Outcome(Status(there["status"]), **{name: there[name] for name in names})
        if outcome.status is not Status.OK:
            return Ended(outcome)
        return Ended(outcome, descriptor=self._tar.fileno(), offset=there["offset"], length=there["length"])


class ImageShard:
    """One run of `run`; then `ended`, and the rest of what is public."""

    def __init__(
        self,
        shard: int,
        pairs: pa.Table,
        config: ImagesConfig,
        tar: DeterministicTar,
        aside: IO[bytes],
        published: PublishedShard | None,
    ) -> None:
        self._config = config
        self._tar = tar
        self._aside = aside
        self._published = published
        self._rows: list[Row] = pairs.to_pylist()
        self._waiting: dict[int, Ended] = {}
        self._waiting_bytes = self._next_to_write = 0
        self._outcomes: list[Outcome] = []
        self.keys = [row_key(shard, row, config.shard_rows) for row in range(pairs.num_rows)]
        self.failing_hosts: Counter[str] = Counter()
        self.fetched_bytes = 0
        self.attempts = 0

    def ended(self) -> list[Outcome]:
        """How each row ended, in row order."""
        assert len(self._outcomes) == len(self._rows), "rows in are rows out"
        return self._outcomes

    async def run(self, children: Children, fetch: Fetch, begun: asyncio.Semaphore) -> None:
        async with asyncio.TaskGroup() as tasks:
            for group in await self._to_fetch(children):
                await begun.acquire()
                tasks.create_task(self._end(group, children, fetch)).add_done_callback(lambda _: begun.release())

    async def _to_fetch(self, children: Children) -> list[list[int]]:
        """Ends the rows that need no fetch; groups the others by URL: neighbours of one URL are fetched once."""
        asked: list[int] = []
        for row in range(len(self._rows)):
            ended = self._early(row)
            asked.append(row) if ended is None else self._settle(row, ended)
        reasons = await children.judge([(self._rows[row]["url"], self._rows[row]["caption"]) for row in asked])
        kept: list[int] = []
        for row, reason in zip(asked, reasons, strict=True):
            kept.append(row) if reason is None else self._settle(row, Ended(Outcome(Status.FILTERED, reason)))
        self._write_ready()
        return [list(group) for _, group in groupby(kept, key=self._place)]

    def _place(self, row: int) -> tuple[Any, ...]:
        """Where the bytes come from: rows of tars that name one URL have a picture each."""
        pair = self._rows[row]
        place = (pair["source_file"], pair["stored_offset"]) if pair["stored_offset"] is not None else ()
        return pair["url"], *place

    def _early(self, row: int) -> Ended | None:
        """How a row ends that needs neither filter nor fetch. A pair without a caption trains nothing: no filter."""
        pair = self._rows[row]
        if pair["mark"] is not None:
            return Ended(Outcome(Status.DUPLICATE if pair["mark"] == Mark.DUPLICATE else Status.REMOVED))
        if self._published is not None and (ended := self._published.ended(row, pair["pair_id"])) is not None:
            return ended
        if pair["url"] is None:
            return Ended(Outcome(Status.REFUSED, "url_missing" if pair["url_bytes"] is None else "url_not_utf8"))
        if pair["caption"] is None:
            reason = "caption_missing" if pair["caption_bytes"] is None else "caption_not_utf8"
            return Ended(Outcome(Status.FILTERED, reason))
        return None

    async def _end(self, rows: list[int], children: Children, fetch: Fetch) -> None:
        try:
            ended = [Ended(decoded.outcome, decoded.data) for decoded in await self._decoded(rows, children, fetch)]
        except UnclipError:
            raise
        except Exception:
            # A defect of ours must not cost the other rows of the shard; it is counted under a reason of its own.
            log.exception("row %s failed unexpectedly", self.keys[rows[0]])
            ended = [Ended(Outcome(Status.FETCH_FAILED, "internal_error"))] * len(rows)
        for row, end in zip(rows, ended, strict=True):
            self._settle(row, end)
        self._write_ready()

    async def _decoded(self, rows: list[int], children: Children, fetch: Fetch) -> list[Decoded]:
        pairs = [self._rows[row] for row in rows]
        async with fetch(pairs[0]) as fetched:
            self.attempts += fetched.attempts
            if fetched.body is None:
                if fetched.status is Status.FETCH_FAILED and fetched.host:  # a file that is missing has none
                    self.failing_hosts[fetched.host] += len(rows)
                return [Decoded(None, Outcome(fetched.status, fetched.reason))] * len(rows)
            self.fetched_bytes += len(fetched.body)
            if not self._config.filters.picture_filters:
                return [await children.decode(fetched.body, pairs[0]["url"], pairs[0]["caption"])] * len(rows)
            # A user's filter sees the caption too, and may say yes to one of them and no to another.
            return [await children.decode(fetched.body, pair["url"], pair["caption"]) for pair in pairs]

    def _settle(self, row: int, ended: Ended) -> None:
        size = len(ended.data) if ended.data is not None else 0
        if size and row != self._next_to_write and self._waiting_bytes + size > _WAITING_BYTES:
            place = self._aside.seek(0, os.SEEK_END)
            self._aside.write(ended.data or b"")
            self._aside.flush()
            ended, size = Ended(ended.outcome, None, self._aside.fileno(), place, size), 0
        self._waiting_bytes += size
        self._waiting[row] = ended

    def _write_ready(self) -> None:
        for row, ended in self._in_turn():
            data = ended.picture()
            self._waiting_bytes -= len(ended.data) if ended.data is not None else 0
            self._outcomes.append(ended.outcome if data is None else self._written(row, ended.outcome, data))

    def _in_turn(self) -> Iterator[tuple[int, Ended]]:
        while (ended := self._waiting.pop(self._next_to_write, None)) is not None:
            self._next_to_write += 1
            yield self._next_to_write - 1, ended

    def _written(self, row: int, outcome: Outcome, data: bytes) -> Outcome:
        key, pair = self.keys[row], self._rows[row]
        offset = self._tar.add(f"{key}.{self._config.format}", data)
        self._tar.add(f"{key}.txt", pair["caption"].encode())
        self._tar.add(f"{key}.json", _member(key, pair, outcome))
        return replace(outcome, offset=offset, length=len(data))


def _member(key: str, pair: Row, outcome: Outcome) -> bytes:
    """What `json.dumps(…, ensure_ascii=False, indent=4)` writes of img2dataset's fields, in a fifth of its time."""
    return f"""{{
    "caption": {encode_basestring(pair["caption"])},
    "url": {encode_basestring(pair["url"])},
    "key": "{key}",
    "status": "success",
    "error_message": null,
    "width": {outcome.width},
    "height": {outcome.height},
    "original_width": {outcome.original_width},
    "original_height": {outcome.original_height},
    "sha256": "{outcome.image_sha256}"
}}""".encode()
