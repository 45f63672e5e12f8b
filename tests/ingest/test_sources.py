import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import UserError
from ingest.source_config import EvaluationSetConfig, SourceConfig
from ingest.sources import FolderSource, Source, open_evaluation_set, open_source, source_identity
from tests.ingest.conftest import jpeg

ROWS: list[tuple[bytes | None, bytes | None]] = [
    (b"http://a/1.jpg", "größer, „schön“".encode()),
    (b"http://a/2.jpg", None),
    (None, b"no url"),
    (b"http://a/4.jpg", b"broken \xff\xfe bytes"),
    (b"http://a/5.jpg", b"\xe2\x80\xab right to left, two\nlines"),
]


def write(path: Path) -> Path:
    """ROWS in the format that the file's name says."""
    if path.suffix == ".parquet":
        url, caption = (pa.array([row[i] for row in ROWS], pa.binary()) for i in (0, 1))
        pq.write_table(
            pa.table({"n": range(len(ROWS)), "caption": caption.view(pa.string()), "url": url.view(pa.string())}), path
        )
        return path
    name = path.name.removesuffix(".gz")
    if name.endswith((".csv", ".tsv")):
        mark = b"," if name.endswith(".csv") else b"\t"
        cell = lambda value: b"" if value is None else b'"' + value + b'"'  # noqa: E731
        lines = [mark.join((b"n", b"caption", b"url")), *(mark.join((b"1", cell(c), cell(u))) for u, c in ROWS)]
        data = b"\n".join(lines) + b"\n"
    else:
        text = lambda value: None if value is None else value.decode("utf-8", "surrogateescape")  # noqa: E731
        lines = [json.dumps({"caption": text(c), "url": text(u)}, ensure_ascii=False) for u, c in ROWS]
        data = "\n".join(lines).encode("utf-8", "surrogateescape")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def rows_of(source: Source) -> list[tuple[bytes | None, bytes | None]]:
    listed = [
        [pa.array(values, pa.large_binary()).to_pylist() for values in (batch.urls, batch.captions)]
        for batch in source.batches()
    ]
    return [pair for urls, captions in listed for pair in zip(urls, captions, strict=True)]


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.tsv", "t.jsonl", "t.csv.gz", "t.jsonl.gz"])
def test_every_format_gives_the_bytes_that_are_there(tmp_path: Path, name: str):
    assert rows_of(open_source(str(write(tmp_path / name)))) == ROWS


def test_a_glob_reads_its_files_in_order_of_name_and_counts_rows_in_each(tmp_path: Path):
    for name in ("b.csv", "a.parquet", "sub/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name)
    batches = list(open_source(f"{tmp_path}/**").batches())
    assert [(batch.source_file, batch.first_row, len(batch.urls)) for batch in batches] == [
        ("a.parquet", 0, 5),
        ("b.csv", 0, 5),
        ("sub/c.jsonl", 0, 5),
    ]


def test_a_name_that_is_no_text_is_refused_before_any_work(tmp_path: Path):
    write(tmp_path / "t.csv").rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.csv"))
    with pytest.raises(UserError, match="name is not UTF-8"):
        open_source(f"{tmp_path}/*.csv")


def test_fsspec_uris_are_sources(tmp_path: Path):
    assert rows_of(open_source(f"file://{write(tmp_path / 't.parquet')}")) == ROWS


def test_dictionary_columns_are_text(tmp_path: Path):
    column = pa.array(["x", "y", "x"]).dictionary_encode()
    pq.write_table(pa.table({"url": column, "caption": column}), tmp_path / "t.parquet")
    assert rows_of(open_source(f"{tmp_path}/t.parquet")) == [(b"x", b"x"), (b"y", b"y"), (b"x", b"x")]


def test_a_line_that_is_no_object_costs_that_row(tmp_path: Path):
    (tmp_path / "t.jsonl").write_text('{"url": "u", "caption": "c"}\n{half\n7\n{"url": "v", "caption": "\\ud800"}\n')
    assert rows_of(open_source(f"{tmp_path}/t.jsonl")) == [
        (b"u", b"c"),
        (None, None),
        (None, None),
        (b"v", b"\xed\xa0\x80"),
    ]


def parquet(path: Path, **columns: pa.Array) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


TEXT = pa.array(["x"])


@pytest.mark.parametrize("missing", ["none.parquet", "none*.parquet", "folder"])
def test_no_file_is_named(tmp_path: Path, missing: str):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"source\.pairs .*(does not exist|matches no file|is a folder)"):
        open_source(f"{tmp_path}/{missing}")


def test_an_evaluation_set_that_is_missing_is_called_by_its_name(tmp_path: Path):
    config = EvaluationSetConfig(name="probe", pairs=f"{tmp_path}/none.parquet")
    with pytest.raises(UserError, match=r"evaluation_sets probe\.pairs .* does not exist"):
        open_evaluation_set(config, SourceConfig())


def test_an_unknown_protocol_is_named():
    with pytest.raises(UserError, match="nosuch"):
        open_source("nosuch://x/t.parquet")


def test_a_missing_column_lists_those_there_are(tmp_path: Path):
    path = parquet(tmp_path / "t.parquet", link=TEXT, text=TEXT)
    with pytest.raises(UserError, match=r"no column 'url'; it has 'link', 'text'\. Set source\.url_column"):
        open_source(str(path))
    with pytest.raises(UserError, match=r"no column 'caption'.*source\.caption_column"):
        open_source(str(path), url_column="link")
    assert rows_of(open_source(str(path), url_column="link", caption_column="text")) == [(b"x", b"x")]
    (tmp_path / "t.csv").write_text("link,text\na,b\n")
    (tmp_path / "t.jsonl").write_text('{"link": "a", "text": "b"}\n')
    for name in ("t.csv", "t.jsonl"):
        with pytest.raises(UserError, match="no column 'url'; it has 'link', 'text'"):
            open_source(f"{tmp_path}/{name}")


def test_captions_of_numbers_are_refused(tmp_path: Path):
    parquet(tmp_path / "t.parquet", url=TEXT, caption=pa.array([1.5]))
    (tmp_path / "t.csv").write_text("url,caption\nhttp://a/b,1\nhttp://a/c,2\n")
    (tmp_path / "t.jsonl").write_text('{"url": "http://a", "caption": 3}\n')
    for name in ("t.parquet", "t.csv", "t.jsonl"):
        with pytest.raises(UserError, match=r"column 'caption' of .* holds (double|int64|int \(3\)), not text"):
            open_source(f"{tmp_path}/{name}")


def test_empty_tables_are_refused(tmp_path: Path):
    parquet(tmp_path / "t.parquet", url=pa.array([], pa.string()), caption=pa.array([], pa.string()))
    (tmp_path / "t.csv").write_text("url,caption\n")
    for name in ("t.parquet", "t.csv"):
        with pytest.raises(UserError, match="has no rows"):
            open_source(f"{tmp_path}/{name}")
    for name in ("empty.csv", "empty.jsonl", "empty.parquet"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UserError):
            open_source(f"{tmp_path}/{name}")


def test_files_that_are_not_what_their_name_says_are_refused(tmp_path: Path):
    for name in ("t.parquet", "t.jsonl", "t.csv.gz"):
        (tmp_path / name).write_bytes(b"neither one nor the other\n")
        with pytest.raises(UserError, match=name):
            open_source(f"{tmp_path}/{name}")
    (tmp_path / "t.xlsx").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"\.parquet, \.csv"):
        open_source(f"{tmp_path}/t.xlsx")


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.jsonl"])
def test_an_unreadable_file_is_refused(tmp_path: Path, name: str):
    (tmp_path / name).symlink_to("/proc/self/mem")  # whoever reads it, root too, gets an I/O error
    with pytest.raises(UserError, match=f"{name}. cannot be read"):
        open_source(f"{tmp_path}/{name}")


def test_identity_is_names_sizes_and_hashes_wherever_the_files_lie(tmp_path: Path):
    (tmp_path / "moved").mkdir()
    first, second = (source_identity(open_source(str(write(tmp_path / place)))) for place in ("t.csv", "moved/t.csv"))
    assert first == second and set(first["files"][0]) == {"name", "bytes", "sha256"}
    (tmp_path / "t.csv").write_text("url,caption\na,b\n")
    assert source_identity(open_source(f"{tmp_path}/t.csv")) != first


def test_a_remembered_hash_is_used_until_the_file_changes(tmp_path: Path):
    path = write(tmp_path / "t.csv")
    remembered: dict[str, dict[str, object]] = {}
    source_identity(open_source(str(path)), remembered)
    json.dumps(remembered)
    remembered[str(path)]["sha256"] = "remembered"
    assert source_identity(open_source(str(path)), remembered)["files"][0]["sha256"] == "remembered"
    path.write_text("url,caption\na,b\n")
    assert source_identity(open_source(str(path)), remembered)["files"][0]["sha256"] != "remembered"


def test_a_folder_is_pictures_with_captions_beside_them(tmp_path: Path):
    for name in ("b.jpg", "a.png", "deep/c.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jpeg())
    (tmp_path / "b.txt").write_text("a caption\n")
    (tmp_path / "other.txt").write_text("belongs to no picture")
    config = EvaluationSetConfig(name="e", folder=str(tmp_path))
    source = open_evaluation_set(config, SourceConfig())
    assert rows_of(source) == [(b"a.png", b""), (b"b.jpg", b"a caption"), (b"deep/c.webp", b"")]
    names = [file["name"] for file in source_identity(source)["files"]]
    assert names == ["a.png", "b.jpg", "b.txt", "deep/c.webp"]


def test_a_folder_without_pictures_is_refused(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"holds no picture|is not a folder"):
            FolderSource(str(folder))
