"""Tables as they are found: published collections' layouts, packed files, and lines that are wrong."""

import bz2
import gzip
import json
import lzma
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from cluster.errors import UserError
from ingest import lines
from ingest.source_config import EvaluationSetConfig, SourceConfig
from ingest.sources import open_evaluation_set, open_source, open_training_source
from ingest.tables import BATCH_BYTES
from tests.ingest.test_sources import parquet, rows_of

Pairs = list[tuple[bytes | None, bytes | None]]
ONE: Pairs = [(b"http://a/1.jpg", b"one"), (b"http://a/2.jpg", b"two")]


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def read(path: Path, **settings: object) -> Pairs:
    return rows_of(open_training_source(SourceConfig(pairs=str(path), **settings)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("preset", "name", "text"),
    [
        ("cc3m", "Train_GCC-training.tsv", 'a "quoted" word\thttp://a/1.jpg\n"opens, never closes\thttp://a/2.jpg\n'),
        ("cc12m", "cc12m.tsv", 'http://a/1.jpg\ta "quoted" word\nhttp://a/2.jpg\t"opens, never closes\n'),
    ],
)
def test_tsv_collections_have_no_names_and_no_quoting(tmp_path: Path, preset: str, name: str, text: str):
    (tmp_path / name).write_text(text)
    expected = [(b"http://a/1.jpg", b'a "quoted" word'), (b"http://a/2.jpg", b'"opens, never closes')]
    assert read(tmp_path / name, preset=preset) == expected


@pytest.mark.parametrize(
    ("preset", "url", "caption"), [("laion", "URL", "TEXT"), ("coyo", "url", "text"), ("datacomp", "url", "text")]
)
def test_parquet_collections_have_their_columns(tmp_path: Path, preset: str, url: str, caption: str):
    columns = {"similarity": pa.array([0.1]), url: pa.array(["http://a/1.jpg"]), caption: pa.array(["one"])}
    assert read(parquet(tmp_path / "t.parquet", **columns), preset=preset) == ONE[:1]


def test_what_is_named_goes_before_the_preset(tmp_path: Path):
    columns = {"URL": pa.array(["http://a/1.jpg"]), "TEXT": pa.array(["no"]), "better": pa.array(["one"])}
    path = parquet(tmp_path / "t.parquet", **columns)
    assert read(path, preset="laion", caption_column="better") == ONE[:1]
    with pytest.raises(UserError, match="no column 'url'; it has 'URL', 'TEXT', 'better'"):
        read(path, preset="coyo")


def test_names_may_be_given_for_a_table_without_any(tmp_path: Path):
    (tmp_path / "t.csv").write_text('7,"one",http://a/1.jpg\n8,"two",http://a/2.jpg\n')
    assert read(tmp_path / "t.csv", column_names=("n", "caption", "url")) == ONE
    with pytest.raises(ValidationError, match="column 'url' is not in column_names, which are n, link"):
        SourceConfig(column_names=("n", "link"))


def test_a_source_is_in_one_place():
    with pytest.raises(ValidationError, match="pairs and folder are both set; a run has one source"):
        SourceConfig(pairs="t.parquet", folder="pictures")
    with pytest.raises(UserError, match=r"source\.pairs is not set"):
        open_training_source(SourceConfig())


def test_how_a_table_is_read_is_part_of_what_it_is():
    """What shapes the rows is told, and a setting that is left alone changes nothing."""
    plains = [
        SourceConfig(**settings).table_format().plain()  # type: ignore[arg-type]
        for settings in (
            {},
            {"caption_column": "text"},
            {"column_names": ("url", "caption")},
            {"quoted": False},
            {"image_column": "png"},
        )
    ]
    assert plains[0] == {"columns": ["url", "caption"]}
    assert len({json.dumps(plain) for plain in plains}) == len(plains)


def test_an_evaluation_set_has_the_sources_columns_unless_it_names_its_own(tmp_path: Path):
    source = SourceConfig(pairs="unread", preset="laion")
    as_source = parquet(tmp_path / "a.parquet", URL=pa.array(["http://a/1.jpg"]), TEXT=pa.array(["one"]))
    own = parquet(tmp_path / "b.parquet", url=pa.array(["http://a/1.jpg"]), text=pa.array(["one"]))
    for config in (
        EvaluationSetConfig(name="e", pairs=str(as_source)),
        EvaluationSetConfig(name="e", pairs=str(own), caption_column="text"),
    ):
        assert rows_of(open_evaluation_set(config, source)) == ONE[:1]


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstd,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("ending", PACKINGS)
def test_packed_text_is_unpacked_and_may_consist_of_several_parts(tmp_path: Path, ending: str):
    pack = PACKINGS[ending]
    csv = b"".join(pack(part) for part in (b"url,caption\nhttp://a/1.jpg,one\n", b"http://a/2.jpg,two\n"))
    (tmp_path / f"t.csv{ending}").write_bytes(csv)
    lines_of_json = "".join(json.dumps({"url": u.decode(), "caption": c.decode()}) + "\n" for u, c in ONE)  # type: ignore[union-attr]
    (tmp_path / f"t.jsonl{ending}").write_bytes(pack(lines_of_json.encode()))
    for name in ("t.csv", "t.jsonl"):
        assert read(tmp_path / f"{name}{ending}") == ONE


def test_a_packed_file_that_ends_early_is_named(tmp_path: Path):
    noise = random.Random(0).randbytes(9_000_000).hex().encode()
    text = b"url,caption\n" + b"".join(b"u," + noise[n : n + 90] + b"\n" for n in range(0, len(noise), 90))
    for ending, pack in (("gz", gzip.compress), ("zst", zstd)):
        packed = pack(text)
        (tmp_path / f"t.csv.{ending}").write_bytes(packed[: len(packed) * 9 // 10])
        with pytest.raises(UserError, match=rf"t\.csv\.{ending}' cannot be read as CSV"):
            read(tmp_path / f"t.csv.{ending}")


def test_what_cannot_be_a_source_says_what_to_do(tmp_path: Path):
    for name, remedy in (("t.parquet.gz", "Unpack it"), ("t.tar.gz", "Unpack it to .tar"), ("t.tgz", "Unpack it")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match=remedy):
            open_source(f"{tmp_path}/{name}")


def test_a_filesystem_whose_package_is_missing_names_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        UserError, match=r"'gs://.*needs a package that is not installed\. .*pip install 'unclip-pipeline\[gcs\]'"
    ):
        open_source("gs://bucket/t.parquet")


@pytest.mark.parametrize("block_bytes", [8, 1 << 20])
def test_a_line_of_csv_with_a_wrong_number_of_values_is_a_row_of_nulls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
):
    monkeypatch.setattr(lines, "BLOCK_BYTES", block_bytes)
    good = b"http://a/1.jpg,one\n"
    (tmp_path / "t.csv").write_bytes(b"url,caption\n" + good + b"alone\n" + b"\n" + good + b"a,b,c\n" * 2 + b"last,x")
    rows = [ONE[0], (None, None), ONE[0], (None, None), (None, None), (b"last", b"x")]
    assert read(tmp_path / "t.csv") == rows
    (tmp_path / "headless.csv").write_bytes(b"alone\n" + good + b"a,b,c\n")
    assert read(tmp_path / "headless.csv", column_names=("url", "caption")) == [(None, None), ONE[0], (None, None)]


def test_an_empty_value_is_null_and_a_quoted_one_is_not(tmp_path: Path):
    (tmp_path / "t.csv").write_bytes(b'url,caption\nu,\nv,""\n,c\n"",d\nNA,null\n')
    assert read(tmp_path / "t.csv") == [(b"u", None), (b"v", b""), (None, b"c"), (b"", b"d"), (b"NA", b"null")]


HOSTILE = [
    b"\xff\xfe broken",
    b"nul\0inside",
    "\u202eright to left".encode(),
    b"\xed\xa0\x80 lone surrogate",
    b"x" * 1_000_000,
    b"=cmd()|' '!A0",
]


def test_captions_come_as_the_bytes_that_they_are(tmp_path: Path):
    (tmp_path / "t.tsv").write_bytes(b"url\tcaption\n" + b"".join(b"u\t" + text + b"\n" for text in HOSTILE))
    text = pa.array(HOSTILE, pa.binary()).view(pa.string())
    parquet(tmp_path / "t.parquet", url=pa.array(["u"] * len(HOSTILE)), caption=text)
    for name in ("t.tsv", "t.parquet"):
        assert read(tmp_path / name) == [(b"u", text) for text in HOSTILE]


def test_json_lines_that_are_none_are_rows_of_nulls(tmp_path: Path):
    bad = [b"[" * 100_000, b'{"url": ' + b"1" * 5000 + b"}", b"\xff\xfe", b"\0", b'"text"', b"nul", b'{"caption": "c"}']
    good = b'{"url": "http://a/1.jpg", "caption": "one"}'
    (tmp_path / "t.jsonl").write_bytes(b"\n".join([b"\xef\xbb\xbf" + good, *bad, b"", b"  ", good]))
    rows = read(tmp_path / "t.jsonl")
    assert rows == [ONE[0], *[(None, None)] * 6, (None, b"c"), ONE[0]]


def test_a_json_line_beyond_every_limit_costs_itself(tmp_path: Path):
    with (tmp_path / "t.jsonl").open("wb") as file:
        file.write(b'{"url": "u", "caption": "c"}\n{"url": "u", "caption": "')
        for _ in range(2 * lines.MAX_RECORD_BYTES // (1 << 20)):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"url": "v", "caption": "d"}\n')
    assert read(tmp_path / "t.jsonl") == [(b"u", b"c"), (None, None), (b"v", b"d")]


def test_long_captions_of_parquet_come_a_few_at_a_time(tmp_path: Path):
    captions = pa.array([b"%d" % n + b"x" * 1_000_000 for n in range(100)])
    pq.write_table(pa.table({"url": pa.array(["u"] * 100), "caption": captions}), tmp_path / "t.parquet")
    sizes = [batch.captions.nbytes for batch in open_source(f"{tmp_path}/t.parquet").batches()]
    assert sum(sizes) > BATCH_BYTES and max(sizes) < BATCH_BYTES / 2


def test_rows_are_estimated_from_heads(tmp_path: Path):
    count = 60_000
    text = "".join(f"http://a/{n}.jpg,caption number {n}\n" for n in range(count))
    for name, packed in (("t.csv", bytes), ("t.csv.gz", gzip.compress)):
        (tmp_path / name).write_bytes(packed(b"url,caption\n" + text.encode()))
        estimate = open_source(f"{tmp_path}/{name}").estimate()
        assert abs(estimate.rows - count) < 0.2 * count
        assert estimate.bytes == (tmp_path / name).stat().st_size
    parquet(tmp_path / "p.parquet", url=pa.array(["u"] * 777), caption=pa.array(["c"] * 777))
    assert open_source(f"{tmp_path}/p.parquet").estimate().rows == 777
