"""Real pairs over real HTTP. Finds them by UNCLIP_REAL_DATA: a folder with emoji_train.parquet and emoji_eval.parquet
(columns name, caption, png)."""

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
