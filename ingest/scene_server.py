"""A loopback HTTP server for the scenes, and the tables of URLs that name them.

    python -m ingest.scene_server '{"count": 4000, "seed": 0, "port": 8642}'

Prints one line when it answers, and ends at a word on its standard input. Where that closes without a word, the process
that started it was killed: the server answers on for some seconds, as the web would, because workers of that process
may still be at it, and what they commit in their last moments must not say that a picture was nowhere. Whoever starts
the next server waits that long for the port.

A picture's path is its set and index, so nothing is stored and nothing is remembered.

On a few training rows it misbehaves, a fixed number of rows for each kind, chosen by the seed: a demo's ledger should
have something to tell.
"""

import asyncio
import errno
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from enum import StrEnum
from io import BytesIO
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import UserError, WorkFailed
from cluster.storage import Folder
from ingest import scenes
from ingest.source_config import ScenesConfig

HOST = "127.0.0.1"
OVERSIZED_BYTES = 1 << 31
_REPEATED_ROWS = 3
_DRIP_PAUSE_S = 0.5
_READY = "serving scenes on"
_PNG_ONE_IN = 16
_END = "end"
_ORPHANS_S = 5.0  # orphans of a Ray session live for a second or two


class Misbehaviour(StrEnum):
    NOT_FOUND = "not_found"
    TRUNCATED = "truncated"
    DRIP = "drip"
    HTML = "html"
    PRIVATE_REDIRECT = "private_redirect"
    CORRUPT = "corrupt"
    OVERSIZED = "oversized"


def misbehaving_rows(config: ScenesConfig) -> dict[int, Misbehaviour]:
    """Training index → what the server does instead of serving it. Every kind at least once, where there is room."""
    kinds = tuple(Misbehaviour)
    if config.misbehaving_share == 0 or config.count < 10 * len(kinds):
        return {}
    each = max(1, round(config.misbehaving_share * config.count))
    rng = random.Random(f"unclip scenes/{config.seed}/misbehaving")  # noqa: S311
    chosen: dict[int, Misbehaviour] = {}
    while len(chosen) < each * len(kinds):
        chosen.setdefault(int(rng.random() * config.count), kinds[len(chosen) % len(kinds)])
    return chosen


def scene_url(config: ScenesConfig, set_name: str, index: int) -> str:
    extension = "png" if index % _PNG_ONE_IN == _PNG_ONE_IN - 1 else "jpg"
    return f"http://{HOST}:{config.port}/{set_name}/{index:07d}.{extension}"


def scene_rows(config: ScenesConfig, set_name: str) -> int:
    """How many rows the table of a set has: of the training set, with those that real tables have (see below)."""
    if set_name == "training":
        return config.count + min(_REPEATED_ROWS, config.count) + 2
    return int(getattr(config, set_name))


def write_scene_tables(folder: str | os.PathLike[str], config: ScenesConfig) -> dict[str, str]:
    """Write `training.parquet` and one table an evaluation set. → set name: path or URI.

    The training table ends with what real tables have: a few rows twice, a row without a caption, one without a URL.
    `copies` says in two more columns, which a source ignores, which training URL a picture was made from, and how.
    """
    target = Folder(os.fspath(folder))
    target.make()
    rows = [
        (scene_url(config, "training", i), scenes.training_scene(config.seed, i).caption) for i in range(config.count)
    ]
    urls: list[str | None] = [url for url, _ in rows]
    captions: list[str | None] = [caption for _, caption in rows]
    repeated = min(_REPEATED_ROWS, config.count)
    urls += [*urls[:repeated], scene_url(config, "training", 0), None]
    captions += [*captions[:repeated], None, captions[0]]
    tables = {"training": pa.table({"url": pa.array(urls, pa.string()), "caption": pa.array(captions, pa.string())})}

    for name, count in (("heldout_captions", config.heldout_captions), ("heldout_pairs", config.heldout_pairs)):
        tables[name] = pa.table(
            {
                "url": [scene_url(config, name, index) for index in range(count)],
                "caption": [_scene(config, name, index).caption for index in range(count)],
            }
        )
    copies = [_copy(config, index) for index in range(config.copies)]
    origins = [copy.training_index for copy in copies]
    tables["copies"] = pa.table(
        {
            "url": [scene_url(config, "copies", index) for index in range(config.copies)],
            "caption": [copy.scene.caption for copy in copies],
            "copy_of": pa.array(
                [None if i is None else scene_url(config, "training", i) for i in origins], pa.string()
            ),
            "transform": pa.array([copy.transform for copy in copies], pa.string()),
        }
    )
    paths = {}
    for name, table in tables.items():
        packed = BytesIO()
        pq.write_table(table, packed)
        target.write(f"{name}.parquet", packed.getvalue())
        paths[name] = f"{target.uri}/{name}.parquet"
    return paths


def _copy(config: ScenesConfig, index: int) -> scenes.Copy:
    return scenes.copy_scene(config.seed, index, training_count=config.count, copied_share=config.copied_share)


def _scene(config: ScenesConfig, set_name: str, index: int) -> scenes.Scene:
    if set_name == "training":
        return scenes.training_scene(config.seed, index)
    if set_name == "heldout_captions":
        return scenes.heldout_caption_scene(config.seed, index, training_count=config.count)
    if set_name == "heldout_pairs":
        return scenes.heldout_pair_scene(config.seed, index)
    raise KeyError(set_name)


def picture_bytes(config: ScenesConfig, set_name: str, index: int, extension: str) -> bytes:
    """What the server answers with when it behaves."""
    if set_name == "copies":
        copy = _copy(config, index)
        picture = scenes.draw(copy.scene, config.picture_size)
        if copy.transform is not None:
            picture = scenes.transformed(picture, copy.transform)
    else:
        picture = scenes.draw(_scene(config, set_name, index), config.picture_size)
    packed = BytesIO()
    if extension == "png":
        picture.save(packed, "PNG", compress_level=1)
    else:
        picture.save(packed, "JPEG", quality=92, subsampling=0)
    return packed.getvalue()


class SceneServer:
    """The server in a process of its own: a context manager that returns once it answers.

    Raises `UserError` where the port is taken.
    """

    def __init__(self, config: ScenesConfig) -> None:
        self._config = config
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server has been started"
        return self._process.pid

    def start(self) -> None:
        command = [sys.executable, "-m", "ingest.scene_server", self._config.model_dump_json()]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)  # noqa: S603
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line.startswith(_READY):
            return
        _, complaint = self._process.communicate()
        self._process = None
        if "address already in use" in complaint.lower():
            raise UserError(
                f"source.scenes.port {self._config.port} is taken on {HOST} by another process. "
                f"Stop that process, or choose another port with --set source.scenes.port=…"
            )
        raise WorkFailed(f"the scene server did not start: {complaint.strip().splitlines()[-1:]}")

    def stop(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        process.communicate(_END)


async def _answer(config: ScenesConfig, rows: dict[int, Misbehaviour], path: str, out: asyncio.StreamWriter) -> bool:
    """Answer one request; whether the connection may go on."""
    try:
        set_name, _, file_name = path.strip("/").partition("/")
        stem, _, extension = file_name.partition(".")
        index = int(stem)
        kind = rows.get(index) if set_name == "training" else None
        body = b"" if kind is Misbehaviour.NOT_FOUND else picture_bytes(config, set_name, index, extension)
    except (KeyError, ValueError):
        kind, body, extension = Misbehaviour.NOT_FOUND, b"", "jpg"
    content_type = f"image/{'jpeg' if extension == 'jpg' else extension}"
    if kind is Misbehaviour.NOT_FOUND:
        _send(out, "404 Not Found", "text/plain", b"no such scene")
    elif kind is Misbehaviour.HTML:
        _send(out, "200 OK", content_type, b"<!DOCTYPE html><html><body>This picture has moved.</body></html>")
    elif kind is Misbehaviour.PRIVATE_REDIRECT:
        _send(out, "302 Found", "text/plain", b"", extra="Location: http://10.0.0.1/picture.jpg\r\n")
    elif kind is Misbehaviour.CORRUPT:
        _send(out, "200 OK", content_type, body[: len(body) // 2])
    elif kind is Misbehaviour.TRUNCATED:
        _send(out, "200 OK", content_type, body[: len(body) // 2], length=len(body))
        return False
    elif kind is Misbehaviour.OVERSIZED:
        _send(out, "200 OK", content_type, body, length=OVERSIZED_BYTES)
        return False
    elif kind is Misbehaviour.DRIP:
        _send(out, "200 OK", content_type, b"", length=len(body))
        for byte in body:
            out.write(bytes((byte,)))
            await out.drain()
            await asyncio.sleep(_DRIP_PAUSE_S)
        return False
    else:
        _send(out, "200 OK", content_type, body)
    await out.drain()
    return True


def _send(
    out: asyncio.StreamWriter,
    status: str,
    content_type: str,
    body: bytes,
    *,
    length: int | None = None,
    extra: str = "",
) -> None:
    length = len(body) if length is None else length
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n{extra}\r\n"
    out.write(head.encode() + body)


async def serve(config: ScenesConfig) -> None:
    rows = misbehaving_rows(config)

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                if not await _answer(config, rows, head.split(b" ", 2)[1].decode("latin-1"), writer):
                    break
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError, IndexError):
            pass
        finally:
            writer.close()

    server = await _listening(connection, config.port)
    print(f"{_READY} http://{HOST}:{config.port}", flush=True)
    async with server:
        await server.serve_forever()


async def _listening(connection: Callable[..., Awaitable[None]], port: int) -> asyncio.Server:
    """The port may be taken for a while by the server of a process that was killed."""
    until = time.monotonic() + _ORPHANS_S + 1.0
    while True:
        try:
            return await asyncio.start_server(connection, HOST, port, backlog=1024)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > until:
                raise
        await asyncio.sleep(0.1)


def _end_with_stdin() -> None:
    if sys.stdin.read() != _END:
        time.sleep(_ORPHANS_S)
    os._exit(0)


def main() -> None:
    config = ScenesConfig.model_validate_json(sys.argv[1] if len(sys.argv) > 1 else "{}")
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        asyncio.run(serve(config))
    except OSError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
