"""What a platform team does with a run over the months: every command as a person gives it, against a real web server
whose answers change."""

import io
import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.artifact import Artifact
from cluster.storage import Folder
from ingest.removal import TOMBSTONES_FILE, add_tombstones
from tests.cluster.test_object_store import server  # noqa: F401, a fixture

pytestmark = pytest.mark.slow

SHARD_ROWS = 8


class Web:
    """Pictures by number; `gone` are 404. Counts what was asked for, but for robots.txt, which each actor reads."""

    def __init__(self) -> None:
        self.gone: set[str] = set()
        self.requests: Counter[str] = Counter()
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path != "/robots.txt":
                    web.requests[self.path] += 1
                number = self.path.strip("/").removesuffix(".png")
                if self.path in web.gone or not number.isdigit():
                    self.send_error(404)
                    return
                file = io.BytesIO()
                Image.new("RGB", (40, 30), (int(number) % 256, 7, 90)).save(file, "PNG")
                self.send_response(200)
                self.send_header("Content-Length", str(file.tell()))
                self.end_headers()
                self.wfile.write(file.getvalue())

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def url(self, number: int) -> str:
        return f"http://127.0.0.1:{self.port}/{number}.png"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def web() -> Iterator[Web]:
    web = Web()
    yield web
    web.close()


class Run:
    """A run of a table up to its images."""

    def __init__(self, unclip: Any, web: Web, folder: Path, uri: str | None = None) -> None:
        self._unclip, self._web = unclip, web
        self.uri = uri or str(folder / "run")
        self.table = folder / "pairs.parquet"

    def write_table(self, rows: list[tuple[int, str]]) -> None:
        urls, captions = [self._web.url(number) for number, _ in rows], [caption for _, caption in rows]
        pq.write_table(pa.table({"url": urls, "caption": captions}), self.table)

    def __call__(self, *options: str, source: str | None = None, until: str = "images") -> Any:
        settings = {
            "source.scenes": "null",
            "source.pairs": source or str(self.table),
            "evaluation_sets": "[]",
            "images.shard_rows": str(SHARD_ROWS),
            "images.size": "32",
            "images.allow_networks": f'["127.0.0.1/32:{self._web.port}"]',
            "images.attempts": "1",
            "images.hold.min_rows": "4",
        }
        values = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        self._web.requests.clear()
        return self._unclip("run", "tiny", "--out", self.uri, "--until", until, *values, *options)

    def done(self, *options: str, **more: Any) -> str:
        done = self(*options, **more)
        assert done.returncode == 0, done.stderr
        return str(done.stderr)

    def images(self) -> Artifact:
        return Artifact.open(f"{self.uri}/images")

    def ledger(self) -> list[dict[str, Any]]:
        images = self.images()
        return [row for shard in images.shards for row in pq.read_table(images.file(_table(shard.shard))).to_pylist()]

    def states(self) -> Counter[tuple[str, str | None]]:
        return Counter((row["status"], row["reason"]) for row in self.ledger())

    def status(self) -> tuple[int, dict[str, Any]]:
        done = self._unclip("status", self.uri, "--json")
        return done.returncode, json.loads(done.stdout)

    def verified(self) -> None:
        done = self._unclip("verify", f"{self.uri}/images", "--json")
        assert done.returncode == 0, done.stdout


@pytest.fixture
def run(unclip: Any, web: Web, tmp_path: Path) -> Run:
    return Run(unclip, web, tmp_path)


def _table(shard: int) -> str:
    return f"{shard:08d}.parquet"


def test_a_retry_goes_back_to_just_those_rows(run: Run, web: Web, unclip: Any, tmp_path: Path):
    run.write_table([(number, f"caption {number}") for number in range(24)])
    web.gone = {"/3.png", "/20.png"}
    run.done()
    assert run.states() == {("ok", None): 22, ("fetch_failed", "http_404"): 2}
    before = run.images()
    told = run.done("--retry", "fetch_failed")
    assert web.requests == {"/3.png": 1, "/20.png": 1}, told
    assert run.images().content_digest == before.content_digest and run.images().manifest.revision == 2
    web.gone = set()
    run.done("--retry", "fetch_failed,undecodable")
    assert web.requests == {"/3.png": 1, "/20.png": 1}
    assert run.states() == {("ok", None): 24}
    after = run.images()
    assert [entry.files for entry in after.shards][1] == [entry.files for entry in before.shards][1]
    run.verified()

    # What it would have been, had the pictures been there from the start.
    fresh = Run(unclip, web, tmp_path / "fresh")
    (tmp_path / "fresh").mkdir()
    fresh.table = run.table
    fresh.done()
    assert fresh.images().content_digest == after.content_digest

    assert "nothing to do" in run.done("--retry", "fetch_failed")
    wrong = run("--retry", "ok")
    assert wrong.returncode == 2 and "'ok' is no status that can be tried again" in wrong.stderr


def test_a_shard_far_below_its_siblings_is_held_and_done_again_or_accepted(run: Run, web: Web):
    run.write_table([(number, f"caption {number}") for number in range(32)])
    web.gone = {f"/{number}.png" for number in range(8, 24)}  # all of shards 1 and 2
    held = run()
    assert held.returncode == 1 and "2 of 4 shards of images are held back" in held.stderr
    assert "shard 1: 0.0% of its rows succeeded" in held.stderr and "--accept 1,2" in held.stderr
    code, status = run.status()
    assert code == 1 and [(line["artifact"], line["shard"]) for line in status["held"]] == [
        ("images", 1),
        ("images", 2),
    ]
    assert not Path(run.uri, "images", "manifest.json").exists()

    wrong = run("--accept", "0")
    assert wrong.returncode == 2 and "--accept 0: it is no held shard of images; held are: 1, 2" in wrong.stderr
    assert run("--accept", "2").returncode == 1
    assert set(web.requests) == {*(f"/{number}.png" for number in range(8, 16))}

    web.gone -= {f"/{number}.png" for number in range(8, 16)}
    run.done()
    assert set(web.requests) == {*(f"/{number}.png" for number in range(8, 16))}
    assert run.states() == {("ok", None): 24, ("fetch_failed", "http_404"): 8}
    code, status = run.status()
    assert code == 0 and status["held"] == []


def test_a_source_grows_shrinks_and_what_was_taken_down_stays_away(run: Run, web: Web, unclip: Any, tmp_path: Path):
    rows = [(number, f"caption {number}") for number in range(16)]
    run.write_table(rows)
    run.done()
    first = run.images()

    # A later snapshot: two rows are gone, one caption is another, three are new.
    later = [(number, f"caption {number}") for number in range(2, 16) if number != 5] + [(5, "another caption")]
    run.write_table([*later, *[(number, f"caption {number}") for number in range(100, 103)]])
    refused = run()
    assert refused.returncode == 2 and "--grow" in refused.stderr
    told = run.done("--grow")
    assert "4 new pairs in 1 shards; 3 vanished from the source and are kept (vanished.parquet lists them)" in told
    assert set(web.requests) == {"/5.png", "/100.png", "/101.png", "/102.png"}
    grown = run.images()
    assert run.states() == {("ok", None): 20}
    assert [entry.files for entry in grown.shards][:2] == [entry.files for entry in first.shards]
    assert "nothing to do" in run.done()

    # What was kept may still be removed, in the same snapshot.
    assert "0 new pairs in 0 shards; 3 vanished from the source and are removed" in run.done("--grow", "--prune")
    assert run.states() == {("ok", None): 17, ("removed", None): 3} and not web.requests
    assert "nothing to do" in run.done("--grow", "--prune") and "nothing to do" in run.done()

    # A takedown is followed by whatever comes later.
    listed = tmp_path / "list.txt"
    listed.write_text(f"{web.url(7)}\n{web.url(100)}\n")
    taken = unclip("takedown", run.uri, "--urls", str(listed), "--json")
    assert taken.returncode == 0 and json.loads(taken.stdout)["pairs"] == 2, taken.stderr
    assert run.states() == {("ok", None): 15, ("removed", None): 5}
    erased = [row for row in run.ledger() if row["status"] == "removed"]
    assert {(row["url"], row["caption"], row["image_sha256"]) for row in erased} == {(None, None, None)}
    assert "nothing to do" in run.done()
    run.verified()
    compared = unclip("diff", run.uri, run.uri)
    assert compared.returncode == 0

    # A snapshot that still names what was taken down: it stays away. What only had vanished (caption 5) may come back.
    run.write_table([(number, f"caption {number}") for number in (*range(2, 8), 100, 101, 200)])
    told = run.done("--grow", "--prune")
    assert "2 new pairs in 1 shards" in told and "and are removed" in told
    assert web.requests == {"/5.png": 1, "/200.png": 1}
    kept = {row["caption"] for row in run.ledger() if row["status"] == "ok"}
    assert kept == {f"caption {number}" for number in (2, 3, 4, 5, 6, 101, 200)}
    assert {row["status"] for row in run.ledger()} == {"ok", "removed"}
    run.verified()

    # From nothing, but for the tombstones.
    for stage in ("pairs", "images"):
        run.done("--rebuild", stage)
    assert Counter(row["status"] for row in run.ledger()) == {"ok": 7, "removed": 2}
    assert not {"/7.png", "/100.png"} & set(web.requests)


def test_a_takedown_that_was_killed_is_finished_by_the_next_run(run: Run, web: Web):
    run.write_table([(number, f"caption {number}") for number in range(8)])
    run.done()
    row = next(row for row in run.ledger() if row["url"] == web.url(4))
    add_tombstones(Folder(run.uri), {row["pair_id"]}, 1)  # as far as a kill let it come
    assert "finished takedown 1" in run.done() and Path(run.uri, TOMBSTONES_FILE).exists()
    assert run.states() == {("ok", None): 7, ("removed", None): 1}


def test_pictures_that_a_source_brings_are_not_fetched(run: Run, web: Web, unclip: Any, tmp_path: Path):
    run.write_table([(number, f"caption {number}") for number in range(12)])
    run.done()
    first = {row["url"]: row["caption"] for row in run.ledger()}
    again = Run(unclip, web, tmp_path / "again")
    again.done(source=f"{run.uri}/images/*.tar")
    assert not web.requests
    assert {row["url"]: row["caption"] for row in again.ledger()} == first
    assert again.states() == {("ok", None): 12}
    again.verified()


@pytest.mark.usefixtures("server")
def test_a_run_lives_in_an_object_store(unclip: Any, web: Web, tmp_path: Path):
    run = Run(unclip, web, tmp_path, "s3://bucket/a/run")
    run.write_table([(number, f"caption {number}") for number in range(20)])
    web.gone = {"/3.png", "/12.png"}
    assert "how much room there is, an object store does not say" in run.done()
    listed = tmp_path / "list.txt"
    listed.write_text(web.url(5))
    assert unclip("takedown", run.uri, "--urls", str(listed)).returncode == 0
    web.gone = {"/12.png"}
    run.done("--retry", "fetch_failed")
    assert web.requests == {"/3.png": 1, "/12.png": 1}
    assert run.states() == {("ok", None): 18, ("removed", None): 1, ("fetch_failed", "http_404"): 1}
    assert unclip("gc", run.uri).returncode == 0
    run.verified()

    disk = Run(unclip, web, tmp_path)
    disk.table = run.table
    disk.done()
    assert unclip("takedown", disk.uri, "--urls", str(listed)).returncode == 0
    compared = unclip("diff", disk.uri, run.uri)
    assert compared.returncode == 0 and "equal, byte for byte" in compared.stdout
