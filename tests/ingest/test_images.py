import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from cluster.artifact import Artifact, Request
from cluster.workshop import Workshop, begin
from ingest.config import ImagesConfig
from ingest.images import ImagesWorker
from ingest.ledger import LEDGER_SCHEMA, ledger_table, row_key
from ingest.outcome import Outcome, Status
from ingest.partition import build_pairs
from ingest.sources import FolderSource, SourceBatch
from tests.ingest.conftest import HostileServer, jpeg

SETTINGS: dict[str, Any] = {
    "size": 32, "deadline_s": 3.0, "min_rate_after_s": 0.4, "backoff_s": 0.01, "max_bytes": 100_000,
    "max_decompressed_bytes": 200_000, "max_pixels": 1_000_000, "allow_networks": ["127.0.0.1/32"],
}  # fmt: skip

# path (or a whole URL, or bytes, or None), caption → how the row must end
ROWS: list[tuple[str | bytes | None, bytes | None, str, str | None]] = [
    ("/drip", b"a drip", "fetch_failed", "too_slow"),
    ("/good", b"one", "ok", None),
    ("/good", b"two", "ok", None),
    ("/good", b"one", "duplicate", None),
    ("/good", None, "filtered", "caption_missing"),
    ("/good", b"\xff\xfe", "filtered", "caption_not_utf8"),
    ("/good", b"", "ok", None),
    (None, b"no url", "refused", "url_missing"),
    (b"http://\xff/", b"url of bytes", "refused", "url_not_utf8"),
    ("/404", b"gone", "fetch_failed", "http_404"),
    ("/503", b"busy", "fetch_failed", "http_503"),
    ("/truncated", b"cut", "fetch_failed", "connection_cut"),
    ("/to_private", b"inwards", "refused", "address_private"),
    ("http://127.0.0.2:1/x", b"outside the allowed network", "refused", "address_loopback"),
    ("file:///etc/passwd", b"a file", "refused", "scheme"),
    ("/declared_large", b"large", "refused", "body_too_large"),
    ("/html", b"a page", "undecodable", "html"),
    ("/half", b"half a picture", "undecodable", "corrupt_image"),
    ("/huge", b"a bomb", "refused", "too_many_pixels"),
    ("/gzip", "überall schön 🎈".encode(), "ok", None),
    ("/png", b"grey png", "ok", None),
]


class Rows:
    def __init__(self, base: str) -> None:
        self.urls = [(base + u).encode() if isinstance(u, str) and u.startswith("/") else u for u, *_ in ROWS]

    def batches(self) -> Iterator[SourceBatch]:
        urls = [url.encode() if isinstance(url, str) else url for url in self.urls]
        yield SourceBatch("rows", 0, urls, [caption for _, caption, *_ in ROWS])


@pytest.fixture
def pairs(hostile: HostileServer, workshop: Callable[[str], Workshop]) -> Artifact:
    half = jpeg((200, 200))
    grey = io.BytesIO()
    Image.new("L", (20, 10), 80).save(grey, "PNG")
    large = io.BytesIO()
    Image.new("1", (1500, 1500)).save(large, "PNG")
    hostile.answers["/html"] = [hostile.ok(b"<html>no picture</html>")]
    hostile.answers["/half"] = [hostile.ok(half[: len(half) // 2])]
    hostile.answers["/huge"] = [hostile.ok(large.getvalue())]
    hostile.answers["/png"] = [hostile.ok(grey.getvalue())]
    shop = workshop("pairs")
    return shop.publish(build_pairs(Rows(hostile.url), shop, shard_rows=len(ROWS))["shards"])  # type: ignore[arg-type]


def images(pairs: Artifact, shop: Workshop, **settings: Any) -> tuple[Artifact, dict[str, Any]]:
    config = ImagesConfig(**{**SETTINGS, "shard_rows": len(ROWS), **settings})
    summary = work(ImagesWorker(config.model_dump(mode="json")), pairs, shop)
    return shop.publish(1), json.loads(json.dumps(summary))


def work(worker: ImagesWorker, pairs: Artifact, shop: Workshop, retry: list[str] | None = None) -> dict[str, Any]:
    worker.setup()
    try:
        return worker.process({"shard": 0, "pairs": pairs.uri, "out": shop.plain(), "made_from": "x", "retry": retry})
    finally:
        worker.close()


def test_every_row_ends_in_exactly_one_state(pairs: Artifact, workshop: Callable[[str], Workshop]):
    artifact, summary = images(pairs, workshop("images"))
    ledger = pq.read_table(artifact.file("00000000.parquet"))
    assert ledger.schema.equals(LEDGER_SCHEMA)
    assert list(zip(ledger["status"].to_pylist(), ledger["reason"].to_pylist(), strict=True)) == [
        (status, reason) for _, _, status, reason in ROWS
    ]
    source = pq.read_table(pairs.file("00000000.parquet"))
    for column in ("source_file", "source_row", "pair_id", "url", "caption", "url_bytes", "caption_bytes"):
        assert ledger[column].to_pylist() == source[column].to_pylist()
    assert summary["rows"] == len(ROWS) == sum(summary["counts"].values())
    assert summary["counts"]["ok"] == 5 and summary["reasons"]["undecodable/html"] == 1
    assert artifact.manifest.totals["counts"] == summary["counts"]


# webdataset leaves closing the archive to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_the_tar_holds_the_ok_rows_in_order_at_the_ledgers_offsets(
    pairs: Artifact, workshop: Callable[[str], Workshop]
):
    artifact, _ = images(pairs, workshop("images"))
    path = artifact.file("00000000.tar")
    rows = [row for row in pq.read_table(artifact.file("00000000.parquet")).to_pylist() if row["status"] == "ok"]
    with tarfile.open(path) as tar:
        assert tar.getnames() == [f"{row['key']}.{kind}" for row in rows for kind in ("jpg", "txt", "json")]
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode("pil"))
    data = path.read_bytes()
    for row, sample in zip(rows, samples, strict=True):
        picture = data[row["offset"] : row["offset"] + row["length"]]
        assert Image.open(io.BytesIO(picture)).size == (row["width"], row["height"]) == (32, 32)
        assert sample["__key__"] == row["key"] and sample["txt"] == row["caption"]
        assert sample["jpg"].size == (32, 32)
        facts = sample["json"]
        assert (facts["url"], facts["sha256"], facts["status"]) == (row["url"], row["image_sha256"], "success")
        assert (facts["original_width"], facts["original_height"]) == (row["original_width"], row["original_height"])


def test_concurrency_and_threads_change_no_byte(pairs: Artifact, workshop: Callable[[str], Workshop]):
    first, _ = images(pairs, workshop("a"))
    second, _ = images(pairs, workshop("b"), concurrency=2, decode_processes=2)
    assert first.content_digest == second.content_digest


def test_rows_of_one_url_are_fetched_once(hostile: HostileServer, pairs: Artifact, workshop: Callable[[str], Workshop]):
    hostile.requests.clear()
    _, summary = images(pairs, workshop("images"))
    assert hostile.requests["/good"] == 1  # of three rows that are ok
    assert summary["failing_hosts"] == {f"127.0.0.1:{hostile.port}": 4} and summary["fetched_bytes"] > 0


def test_pictures_that_wait_for_their_turn_in_a_file_are_the_same(
    pairs: Artifact, workshop: Callable[[str], Workshop], monkeypatch: pytest.MonkeyPatch
):
    in_memory, _ = images(pairs, workshop("a"))
    # The first row drips until it is given up, so that all the others wait for it.
    monkeypatch.setattr("ingest.image_shard._WAITING_BYTES", 1)
    in_a_file, _ = images(pairs, workshop("b"))
    assert in_memory.content_digest == in_a_file.content_digest


def test_the_json_of_a_sample_is_what_json_would_write(pairs: Artifact, workshop: Callable[[str], Workshop]):
    artifact, _ = images(pairs, workshop("images"))
    with tarfile.open(artifact.file("00000000.tar")) as tar:
        texts = [
            file.read().decode()
            for name in tar.getnames()
            if name.endswith(".json") and (file := tar.extractfile(name))
        ]
    assert len(texts) == 5
    assert texts == [json.dumps(json.loads(text), ensure_ascii=False, indent=4) for text in texts]


def test_a_retry_takes_over_what_is_not_tried_again(
    hostile: HostileServer, pairs: Artifact, workshop: Callable[[str], Workshop]
):
    shop = workshop("images")
    first, _ = images(pairs, shop)
    hostile.answers["/404"] = hostile.answers["/good"]
    hostile.requests.clear()
    identity = first.manifest.identity
    request = Request(identity["kind"], identity["code_version"], identity["settings"], identity["inputs"])
    again = begin(shop.folder, request, {}, allow_mixed=True, amends={"retry": ["fetch_failed"], "revision": 1})
    config = ImagesConfig(**{**SETTINGS, "shard_rows": len(ROWS)}).model_dump(mode="json")
    work(ImagesWorker(config), pairs, again, ["fetch_failed"])
    second = again.publish(1)
    assert set(hostile.requests) == {"/robots.txt", "/drip", "/404", "/503", "/truncated"}
    before, after = (pq.read_table(artifact.file("00000000.parquet")).to_pylist() for artifact in (first, second))
    changed = [row for row, (old, new) in enumerate(zip(before, after, strict=True)) if old["status"] != new["status"]]
    assert [ROWS[row][0] for row in changed] == ["/404"] and after[changed[0]]["status"] == "ok"
    data, old_data = (artifact.file("00000000.tar").read_bytes() for artifact in (second, first))
    for old, new in zip(before, after, strict=True):
        if old["status"] == "ok":
            end, old_end = new["offset"] + new["length"], old["offset"] + old["length"]
            assert data[new["offset"] : end] == old_data[old["offset"] : old_end]


def test_caption_filters_cost_no_fetch(hostile: HostileServer, pairs: Artifact, workshop: Callable[[str], Workshop]):
    hostile.requests.clear()
    _, summary = images(pairs, workshop("images"), filters={"min_caption_characters": 4})
    assert summary["reasons"]["filtered/caption_too_short"] == 4
    assert hostile.requests["/good"] == 0


def test_an_evaluation_set_may_be_a_folder(tmp_path: Path, workshop: Callable[[str], Workshop]):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    for name in ("a.jpg", "b.png"):
        (folder / name).write_bytes(jpeg())
    (folder / "a.txt").write_text("a caption")
    (folder / "broken.jpg").write_bytes(b"nothing")
    shop, out = workshop("pairs"), workshop("images")
    pairs = shop.publish(build_pairs(FolderSource(str(folder)), shop, shard_rows=10)["shards"])
    work(ImagesWorker({"size": 32, "shard_rows": 10}, FolderSource(str(folder)).pictures()), pairs, out)
    rows = pq.read_table(out.publish(1).file("00000000.parquet")).to_pylist()
    assert [(row["url"], row["caption"], row["status"]) for row in rows] == [
        ("a.jpg", "a caption", "ok"),
        ("b.png", "", "ok"),
        ("broken.jpg", "", "undecodable"),
    ]


def test_keys_are_unique_and_sort_as_rows_do():
    for rows in (10, 1000, 20_000):
        keys = [row_key(shard, row, rows) for shard in range(3) for row in range(rows)]
        assert keys == sorted(set(keys)) and len({len(key) for key in keys}) == 1
    assert row_key(3, 12, 1000) == "000030012"


def test_a_row_without_an_end_is_never_written(pairs: Artifact):
    table = pq.read_table(pairs.file("00000000.parquet"))
    keys = [str(row) for row in range(table.num_rows)]
    outcomes = [Outcome(Status.DUPLICATE)] * table.num_rows
    ledger_table(table, keys, outcomes)
    with pytest.raises(AssertionError, match="as many rows"):
        ledger_table(table, keys, outcomes[:-1])


def test_ingest_imports_no_torch_and_no_ray():
    code = (
        "import sys, ingest.images, ingest.scene_server, ingest.partition; print({'torch', 'ray'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_config_imports_no_numpy():
    code = "import sys, ingest.config; print({'torch', 'ray', 'numpy', 'PIL', 'aiohttp'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
