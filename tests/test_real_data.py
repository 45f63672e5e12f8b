"""Real pairs over real HTTP. Finds them by UNCLIP_REAL_DATA: a folder with emoji_train.parquet and emoji_eval.parquet
(columns name, caption, png)."""

import functools
import gzip
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.artifact import Artifact
from tests.ingest.hostile_web import NETWORK, NOTHING_HERE, Endless, Reset, Script, hostile_web, ok, to
from tests.pipeline.conftest import Command

DATA = os.environ.get("UNCLIP_REAL_DATA")
EXAMPLE = Path(__file__).parents[1] / "examples" / "emoji.yaml"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DATA is None, reason="UNCLIP_REAL_DATA names no folder with real pairs"),
]


class PictureServer(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Tables of URLs and captions whose pictures are served on loopback."""
    folder = tmp_path_factory.mktemp("emoji")
    png_of: dict[str, bytes] = {}

    class Pictures(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            png = png_of.get(self.path, b"")
            self.send_response(200 if png else 404)
            self.send_header("Content-Type", "image/png")
            self.send_header("Content-Length", str(len(png)))
            self.end_headers()
            self.wfile.write(png)

        def log_message(self, *_: object) -> None:
            pass

    server = PictureServer(("127.0.0.1", 0), Pictures)
    tables = {}
    for name in ("emoji_train", "emoji_eval"):
        table = pq.read_table(Path(DATA or "") / f"{name}.parquet")
        paths = [f"/{name}/{picture}" for picture in table["name"].to_pylist()]
        png_of |= dict(zip(paths, table["png"].to_pylist(), strict=True))
        urls = [f"http://127.0.0.1:{server.server_port}{path}" for path in paths]
        tables[name] = folder / f"{name}.parquet"
        pq.write_table(pa.table({"url": urls, "caption": table["caption"]}), tables[name])
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield tables
    server.shutdown()
    thread.join()
    server.server_close()


def test_every_real_pair_is_stored_and_embedded(tables: dict[str, Path], tmp_path: Path) -> None:
    unclip: Any = Command()
    arguments = [
        "--set", f"source.pairs={tables['emoji_train']}",
        "--set", f"evaluation_sets=[{{name: emoji_eval, pairs: {tables['emoji_eval']}}}]",
        "--set", "clip.training.steps=10",
    ]  # fmt: skip
    done = unclip("run", str(EXAMPLE), "--out", str(tmp_path / "run"), "--until", "dedup", *arguments)
    assert done.returncode == 0, done.stderr
    images = Artifact.open(str(tmp_path / "run" / "images"))
    assert images.manifest.totals["counts"] == {"ok": 3280}
    assert Artifact.open(str(tmp_path / "run" / "embeddings")).rows == 3280
    assert Artifact.open(str(tmp_path / "run" / "evaluation" / "emoji_eval" / "embeddings")).rows == 400
    verified = unclip("verify", str(tmp_path / "run"), "--json")
    assert verified.returncode == 0, json.loads(verified.stdout)["findings"]


class Sequences(dict[str, list[Script]]):
    """What a path answers, request by request; its last answer stays."""

    def get(self, path: str, default: Any = NOTHING_HERE) -> Any:
        answers = super().get(path, [default])
        return answers.pop(0) if len(answers) > 1 else answers[0]


@functools.cache
def bomb() -> bytes:
    return gzip.compress(bytes(100_000_000))


def misbehaviour(kind: int, png: bytes) -> tuple[list[Script], str, str | None]:
    """What a picture's path answers, and how its row must end."""
    good: Script = [ok(png)]
    cut: Script = [ok(png[: len(png) // 2], length=len(png))]
    kinds: dict[int, tuple[list[Script], str, str | None]] = {
        0: ([NOTHING_HERE], "fetch_failed", "http_404"),
        1: ([[b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"], good], "ok", None),
        2: ([[b"HTTP/1.1 429 Slow\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"], good], "ok", None),
        3: ([cut], "fetch_failed", "connection_cut"),
        4: ([cut, good], "ok", None),
        5: ([[ok(b"<html>not here any more</html>")]], "undecodable", "html"),
        6: ([[ok(png, "X-Robots-Tag: noai\r\n")]], "refused", "x_robots_tag"),
        7: ([[to("http://10.0.0.1/x.png")]], "refused", "address_private"),
        8: ([[to("http://127.0.0.1:{canary}/")]], "refused", "address_loopback"),
        9: ([[ok(b"", length=5000), Endless(b"x", 0.2)]], "fetch_failed", "too_slow"),
        10: ([[60.0]], "fetch_failed", "deadline"),
        11: ([[ok(png[: len(png) // 2])]], "undecodable", "corrupt_image"),
        12: ([[ok(b"", length=1 << 40)]], "refused", "body_too_large"),
        13: ([[ok(gzip.compress(png), "Content-Encoding: gzip\r\n")]], "ok", None),
        14: ([[ok(bomb(), "Content-Encoding: gzip\r\n")]], "refused", "body_too_large_decompressed"),
        15: ([[0.3, *good]], "ok", None),
        16: ([[Reset()], good], "ok", None),
    }
    return kinds.get(kind, ([good], "ok", None))


def test_every_real_pair_ends_as_its_server_deserves(tmp_path: Path) -> None:
    """Of every fifty pictures seventeen are served badly, on 199 hosts, with traps that lead elsewhere."""
    table = pq.read_table(Path(DATA or "") / "emoji_train.parquet").to_pylist()
    answers, ends = Sequences(), {}
    for row, pair in enumerate(table):
        path = f"/{row}.png"
        answers[path], *ends[path] = misbehaviour(row * 37 % 50, pair["png"])
    with hostile_web(answers) as web:
        urls = [f"http://127.0.1.{row % 199 + 1}:{web.port}/{row}.png" for row in range(len(table))]
        pq.write_table(pa.table({"url": urls, "caption": [pair["caption"] for pair in table]}), tmp_path / "t.parquet")
        settings = {
            "source.pairs": tmp_path / "t.parquet",
            "images.allow_networks": f"[{NETWORK}]",
            "images.deadline_s": 10,
            "images.min_rate_after_s": 2,
        }
        values = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        done = Command()("run", str(EXAMPLE), "--out", str(tmp_path / "run"), "--until", "images", *values)
        assert done.returncode == 0, done.stderr
        assert web.canary_contacts == []
    images = Artifact.open(str(tmp_path / "run" / "images"))
    ledger = [
        row for entry in images.shards for row in pq.read_table(images.file(f"{entry.shard:08d}.parquet")).to_pylist()
    ]
    assert len(ledger) == len(table)
    found = {f"/{row['source_row']}.png": [row["status"], row["reason"]] for row in ledger}
    assert {path: (end, ends[path]) for path, end in found.items() if end != ends[path]} == {}
    for row in ledger:
        if row["status"] == "ok":
            assert row["image_sha256"] == hashlib.sha256(table[row["source_row"]]["png"]).hexdigest()
            assert row["caption"] == table[row["source_row"]]["caption"]
