"""Pictures that a source brings along, from the listing to their bytes."""

import asyncio
import io
import json
import os
import random
import tarfile
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from cluster.artifact import Request
from cluster.errors import UserError
from cluster.storage import Folder
from cluster.workshop import begin
from ingest.brought import brought_pictures
from ingest.fetch import Fetched
from ingest.fetch_config import FetchConfig
from ingest.outcome import Status
from ingest.partition import build_pairs
from ingest.source_config import EvaluationSetConfig, SourceConfig
from ingest.sources import Source, open_evaluation_set, open_training_source
from tests.cluster.test_object_store import server  # noqa: F401, a fixture
from tests.ingest.conftest import jpeg
from tests.ingest.test_tar_members import forged, gnu_sparse, pax

UNREADABLE = Fetched(None, Status.FETCH_FAILED, "file_unreadable")
Row = dict[str, Any]


def opened(**settings: Any) -> Source:
    return open_training_source(SourceConfig(**settings))


def pairs_of(source: Source, place: Path, shard_rows: int = 1000) -> list[Row]:
    """The source's rows as they are in a published artifact."""
    shop = begin(Folder(place / f"pairs-{uuid.uuid4().hex}"), Request("pairs", 1, {}, {}), {})
    artifact = shop.publish(build_pairs(source, shop, shard_rows=shard_rows)["shards"])
    return [row for entry in artifact.shards for row in pq.read_table(artifact.file(entry.files[0].name)).to_pylist()]


def fetched(source: Source, rows: list[Row], **settings: Any) -> list[Fetched]:
    """All rows at once, as the plain description tells a worker elsewhere."""
    plain = json.loads(json.dumps(source.pictures()))

    async def fetch_all() -> list[Fetched]:
        async with brought_pictures(plain, FetchConfig(**settings)) as pictures:

            async def one(row: Row) -> Fetched:
                async with pictures.fetched(row) as answer:
                    return answer

            return list(await asyncio.gather(*(one(row) for row in rows)))

    return asyncio.run(fetch_all())


def tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def picture(n: int) -> bytes:
    return jpeg((16 + n % 50, 16), (n % 256, 0, 0))


def img2dataset_tar(path: Path, first: int, count: int) -> Path:
    files = {}
    for n in range(first, first + count):
        fields = {"caption": f"caption {n}", "url": f"http://a/{n}.jpg", "key": f"{n:09d}", "status": "success"}
        files |= {
            f"{n:09d}.jpg": picture(n),
            f"{n:09d}.txt": f"caption {n}".encode(),
            f"{n:09d}.json": json.dumps(fields, indent=4).encode(),
        }
    return tar(path, files)


def test_img2dataset_tars_keep_urls_and_captions_and_give_their_pictures(tmp_path: Path):
    for shard in range(3):
        img2dataset_tar(tmp_path / f"{shard:05d}.tar", 10 * shard, 10)
    source = opened(pairs=f"{tmp_path}/*.tar")
    rows = pairs_of(source, tmp_path, shard_rows=7)
    assert [(row["url"], row["caption"]) for row in rows] == [(f"http://a/{n}.jpg", f"caption {n}") for n in range(30)]
    assert [(row["source_file"], row["source_row"]) for row in rows[9:11]] == [("00000.tar", 9), ("00001.tar", 0)]
    assert [answer.body for answer in fetched(source, rows)] == [picture(n) for n in range(30)]
    for row in rows:
        data = (tmp_path / row["source_file"]).read_bytes()[row["stored_offset"] :][: row["stored_length"]]
        assert data == picture(int(row["caption"].split()[1]))
    assert source.estimate().rows == 30


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_plain_tars_are_read_as_webdataset_reads_them(tmp_path: Path):
    files = {
        "deep/a.jpg": picture(1),
        "deep/a.txt": b"first\n",
        "b.x.PNG": picture(2),
        "c.cls": b"7",
        "c.webp": picture(3),
        "c.json": b'{"caption": "third", "url": null}',
        "README": b"no sample",
        "d.txt": b"no picture",
    }
    source = opened(pairs=str(tar(tmp_path / "t.tar", files)))
    rows = pairs_of(source, tmp_path)
    assert [(row["url"], row["caption"]) for row in rows] == [
        ("t.tar/deep/a.jpg", "first"),
        ("t.tar/b.x.PNG", ""),
        ("t.tar/c.webp", "third"),
    ]
    assert [answer.body for answer in fetched(source, rows)] == [picture(n) for n in (1, 2, 3)]
    keys = [sample["__key__"] for sample in webdataset.WebDataset(f"{tmp_path}/t.tar", shardshuffle=False)]
    assert [key for key in keys if key != "d"] == ["deep/a", "b", "c"]


def test_equal_keys_in_two_tars_are_two_pairs(tmp_path: Path):
    for name in ("a.tar", "b.tar"):
        tar(tmp_path / name, {"0.jpg": picture(1)})
    rows = pairs_of(opened(pairs=f"{tmp_path}/*.tar"), tmp_path)
    assert [(row["url"], row["mark"]) for row in rows] == [("a.tar/0.jpg", None), ("b.tar/0.jpg", None)]


def hostile_tar() -> bytes:
    """A good sample, then kinds of bad ones, then a good one. No member is read but those two."""
    size = b"%011o" % 3
    good = forged(b"z.jpg", b"%011o" % len(picture(9)), data=picture(9)) + forged(b"z.txt", size, data=b"end")
    return b"".join(
        [
            forged(b"a.jpg", b"%011o" % len(picture(1)), data=picture(1)),
            forged(b"hard.jpg", b"%011o" % 0, b"1"),
            forged(b"soft.jpg", b"%011o" % 0, b"2"),
            forged(b"device.jpg", b"%011o" % 0, b"3"),
            gnu_sparse(),
            forged(b"negative.jpg", b"\xff" * 12),
            pax(b"path", b"../../../../etc/passwd.jpg") + forged(b"p.jpg", size, data=b"pax"),
            forged(b"/etc/hostname.jpg", size, data=b"abs"),
            forged(b"nul.jpg", b"%011o" % 0),
            good,
            forged(b"cut.jpg", b"%011o" % 5000, data=b"x" * 400),
        ]
    )


def test_a_hostile_tar_costs_rows_and_leads_nowhere(tmp_path: Path):
    (tmp_path / "h.tar").write_bytes(hostile_tar())
    source = opened(pairs=f"{tmp_path}/h.tar")
    rows = pairs_of(source, tmp_path)
    answers = {row["url"]: answer for row, answer in zip(rows, fetched(source, rows), strict=True)}
    assert answers == {
        "h.tar/a.jpg": Fetched(picture(1)),
        "h.tar/hard.jpg": UNREADABLE,
        "h.tar/soft.jpg": UNREADABLE,
        "h.tar/device.jpg": UNREADABLE,
        "h.tar/s.jpg": UNREADABLE,
        None: UNREADABLE,
        # Names are names: what is read is the tar's own bytes.
        "h.tar/../../../../etc/passwd.jpg": Fetched(b"pax"),
        "h.tar//etc/hostname.jpg": Fetched(b"abs"),
        "h.tar/nul.jpg": Fetched(None, Status.FETCH_FAILED, "empty_body"),
        "h.tar/z.jpg": Fetched(picture(9)),
        "h.tar/cut.jpg": UNREADABLE,
    }
    assert rows[-2]["caption"] == "end"


def test_a_tar_that_changed_gives_no_wrong_picture(tmp_path: Path):
    path = img2dataset_tar(tmp_path / "t.tar", 0, 20)
    source = opened(pairs=str(path))
    rows = pairs_of(source, tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[512:])
    assert fetched(source, rows) == [UNREADABLE] * 20
    path.write_bytes(data[: len(data) // 2])
    answers = fetched(source, rows)
    assert [answer.body for answer in answers[:8]] == [picture(n) for n in range(8)]
    assert answers[-1] == UNREADABLE
    path.unlink()
    assert fetched(source, rows) == [UNREADABLE] * 20


def test_rows_that_name_other_files_are_not_followed(tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.jpg").write_bytes(picture(1))
    (tmp_path / "in" / "a.jpg").write_bytes(picture(2))
    img2dataset_tar(tmp_path / "secret.tar", 0, 1)
    img2dataset_tar(tmp_path / "in" / "t.tar", 0, 1)
    tricks = ["../secret", "./../secret", f"{tmp_path}/secret", "x/../../secret", "", "\0", "..", "file:///etc/passwd"]
    folder, tars = opened(folder=f"{tmp_path}/in"), opened(pairs=f"{tmp_path}/in/t.tar")
    offset = pairs_of(tars, tmp_path)[0]
    assert fetched(folder, [{"url": "a.jpg"}])[0].body == picture(2)
    assert fetched(folder, [{"url": f"{name}.jpg"} for name in tricks] + [{"url": None}]) == [UNREADABLE] * 9
    rows = [{**offset, "source_file": f"{name}.tar"} for name in tricks]
    assert fetched(tars, rows) == [UNREADABLE] * len(rows)


def test_a_picture_larger_than_max_bytes_is_refused(tmp_path: Path):
    large = b"x" * 5000
    tar(tmp_path / "t.tar", {"a.jpg": large})
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jpg").write_bytes(large)
    pq.write_table(pa.table({"caption": ["c"], "image": [large]}), tmp_path / "t.parquet")
    for source in (
        opened(pairs=f"{tmp_path}/t.tar"),
        opened(folder=f"{tmp_path}/folder"),
        opened(pairs=f"{tmp_path}/t.parquet", image_column="image"),
    ):
        rows = pairs_of(source, tmp_path)
        assert fetched(source, rows, max_bytes=4999) == [Fetched(None, Status.REFUSED, "body_too_large")]
        assert fetched(source, rows, max_bytes=5000) == [Fetched(large)]


def test_a_column_of_pictures_is_read_in_any_order_from_many_row_groups(tmp_path: Path):
    bodies = [random.Random(n).randbytes(n * 37 % 9000) or None for n in range(400)]
    table = pa.table({"url": [f"http://a/{n % 390}" for n in range(400)], "caption": ["c"] * 400, "jpg": bodies})
    pq.write_table(table.slice(0, 250), tmp_path / "0.parquet", row_group_size=60)
    pq.write_table(table.slice(250), tmp_path / "1.parquet", row_group_size=1000)
    source = opened(pairs=f"{tmp_path}/*.parquet", image_column="jpg")
    rows = pairs_of(source, tmp_path)
    random.Random(0).shuffle(rows)
    places = [row["source_row"] + (250 if row["source_file"] == "1.parquet" else 0) for row in rows]
    assert [answer.body for answer in fetched(source, rows)] == [bodies[place] for place in places]
    assert fetched(source, [{"source_file": "0.parquet", "source_row": 250}]) == [UNREADABLE]


@pytest.mark.parametrize("with_url", [True, False])
def test_pictures_as_the_datasets_library_stores_them(tmp_path: Path, with_url: bool):
    images = pa.array([{"bytes": picture(n), "path": f"{n}.jpg"} for n in range(5)])
    columns = {"image": images, "text": pa.array([f"c{n}" for n in range(5)])}
    if with_url:
        columns["url"] = pa.array([f"http://a/{n}" for n in range(5)])
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    source = opened(pairs=f"{tmp_path}/t.parquet", image_column="image", caption_column="text")
    rows = pairs_of(source, tmp_path)
    urls = [f"http://a/{n}" if with_url else f"t.parquet#{n}" for n in range(5)]
    assert [row["url"] for row in rows] == urls
    assert [answer.body for answer in fetched(source, rows)] == [picture(n) for n in range(5)]


def test_a_column_that_holds_no_pictures_is_refused(tmp_path: Path):
    pq.write_table(pa.table({"caption": ["c"], "image": ["text"]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"column 'image' .* holds string, not pictures as bytes"):
        opened(pairs=f"{tmp_path}/t.parquet", image_column="image")
    with pytest.raises(UserError, match=r"no column 'png'; it has 'caption', 'image'\. Set source\.image_column"):
        opened(pairs=f"{tmp_path}/t.parquet", image_column="png")
    pq.write_table(pa.table({"caption": ["c"], "image": [b"x"]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"no column 'link'.*Set source\.url_column"):
        opened(pairs=f"{tmp_path}/t.parquet", image_column="image", url_column="link")
    (tmp_path / "t.csv").write_text("url,caption\na,b\n")
    with pytest.raises(UserError, match="image_column is for Parquet"):
        opened(pairs=f"{tmp_path}/t.csv", image_column="image")


def test_a_parquet_that_changed_gives_no_wrong_picture(tmp_path: Path):
    captions = ["one", None, "three"]
    pq.write_table(pa.table({"caption": captions, "image": [picture(n) for n in range(3)]}), tmp_path / "t.parquet")
    source = opened(pairs=f"{tmp_path}/t.parquet", image_column="image")
    rows = pairs_of(source, tmp_path)
    assert [answer.body for answer in fetched(source, rows)] == [picture(n) for n in range(3)]
    later = pa.table({"caption": [*captions[1:], "new"], "image": [picture(n) for n in (1, 2, 3)]})
    pq.write_table(later, tmp_path / "t.parquet")
    assert fetched(source, rows) == [UNREADABLE] * 3


def test_a_damaged_column_costs_its_rows(tmp_path: Path):
    bodies = [random.Random(n).randbytes(3000) for n in range(300)]
    table = pa.table({"caption": [f"c{n}" for n in range(300)], "image": bodies})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=100, compression="zstd", use_dictionary=False)
    source = opened(pairs=f"{tmp_path}/t.parquet", image_column="image")
    rows = pairs_of(source, tmp_path)
    metadata = pq.ParquetFile(tmp_path / "t.parquet").metadata
    chunk = metadata.row_group(1).column(1)
    data = bytearray((tmp_path / "t.parquet").read_bytes())
    for place in range(chunk.data_page_offset, chunk.data_page_offset + 2000):
        data[place] ^= 0xFF
    (tmp_path / "t.parquet").write_bytes(data)
    answers = fetched(source, rows)
    assert [answer.body for answer in answers[:100]] == bodies[:100]
    assert [answer.body for answer in answers[200:]] == bodies[200:]
    assert UNREADABLE in answers[100:200]


def test_a_folder_is_a_training_source(tmp_path: Path):
    for n in range(4):
        (tmp_path / f"{n}.jpg").write_bytes(picture(n))
        (tmp_path / f"{n}.txt").write_text(f"caption {n}")
    (tmp_path / "3.txt").write_bytes(b"\xff\xfe")
    source = opened(folder=str(tmp_path))
    rows = pairs_of(source, tmp_path / "..")
    assert [(row["url"], row["caption"]) for row in rows[:3]] == [(f"{n}.jpg", f"caption {n}") for n in range(3)]
    assert rows[3]["caption_bytes"] == b"\xff\xfe"
    (tmp_path / "1.jpg").unlink()
    os.mkfifo(tmp_path / "1.jpg")  # a pipe would block whoever reads it for ever
    answers = fetched(source, rows)
    assert [answer.body for answer in answers] == [picture(0), None, picture(2), picture(3)]
    assert answers[1] == UNREADABLE


def test_evaluation_sets_bring_their_pictures_too(tmp_path: Path):
    tar(tmp_path / "t.tar", {"0.jpg": picture(1)})
    pq.write_table(pa.table({"caption": ["c"], "png": [picture(2)]}), tmp_path / "t.parquet")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jpg").write_bytes(picture(3))
    configs = [
        EvaluationSetConfig(name="e", pairs=f"{tmp_path}/t.tar"),
        EvaluationSetConfig(name="e", pairs=f"{tmp_path}/t.parquet", image_column="png"),
        EvaluationSetConfig(name="e", folder=f"{tmp_path}/folder"),
    ]
    for n, config in enumerate(configs):
        source = open_evaluation_set(config, SourceConfig())
        assert [answer.body for answer in fetched(source, pairs_of(source, tmp_path))] == [picture(n + 1)]


def test_remote_files_are_read_in_ranges(tmp_path: Path):
    memory = fsspec.filesystem("memory")
    path = img2dataset_tar(tmp_path / "t.tar", 0, 5)
    bodies = [picture(n) for n in range(5)]
    pq.write_table(pa.table({"caption": ["c"] * 5, "png": bodies}), tmp_path / "t.parquet")
    place = f"/{uuid.uuid4().hex}"
    for name in ("t.tar", "t.parquet"):
        memory.pipe_file(f"{place}/sub/{name}", (tmp_path / name).read_bytes())
    memory.pipe_file(f"{place}/folder/deep/a.jpg", picture(7))
    assert path.exists()
    for source in (
        opened(pairs=f"memory:/{place}/sub/*.tar"),
        opened(pairs=f"memory:/{place}/sub/t.parquet", image_column="png"),
    ):
        assert [answer.body for answer in fetched(source, pairs_of(source, tmp_path))] == bodies
    source = opened(folder=f"memory:/{place}/folder")
    assert [answer.body for answer in fetched(source, pairs_of(source, tmp_path))] == [picture(7)]


@pytest.mark.slow
@pytest.mark.usefixtures("server")
def test_sources_and_pictures_lie_in_an_object_store(tmp_path: Path):
    import s3fs

    store, place = s3fs.S3FileSystem(), f"bucket/{uuid.uuid4().hex}"
    img2dataset_tar(tmp_path / "t.tar", 0, 30)
    bodies = [picture(n) for n in range(30)]
    pq.write_table(pa.table({"caption": ["c"] * 30, "png": bodies}), tmp_path / "t.parquet", row_group_size=11)
    (tmp_path / "t.csv.zst").write_bytes(pa.Codec("zstd").compress(b"url,caption\nu,c\n", asbytes=True))
    for name in ("t.tar", "t.parquet", "t.csv.zst"):
        store.put_file(f"{tmp_path}/{name}", f"{place}/{name}")
    store.pipe_file(f"{place}/folder/deep/a.jpg", picture(7))
    for source, expected in (
        (opened(pairs=f"s3://{place}/*.tar"), bodies),
        (opened(pairs=f"s3://{place}/t.parquet", image_column="png"), bodies),
        (opened(folder=f"s3://{place}/folder"), [picture(7)]),
    ):
        assert [answer.body for answer in fetched(source, pairs_of(source, tmp_path))] == expected
    assert [row["url"] for row in pairs_of(opened(pairs=f"s3://{place}/t.csv.zst"), tmp_path)] == ["u"]
    tars = opened(pairs=f"s3://{place}/t.tar")
    rows = pairs_of(tars, tmp_path)
    store.rm_file(f"{place}/t.tar")
    assert fetched(tars, rows) == [UNREADABLE] * 30
    for missing in (f"s3://{place}/t.tar", f"s3://{place}/*.tar", f"s3://none-{uuid.uuid4().hex}/t.csv"):
        with pytest.raises(UserError, match=r"source\.pairs"):
            opened(pairs=missing)


def test_a_packed_tar_and_one_without_pictures_are_refused(tmp_path: Path):
    tar(tmp_path / "t.tar", {"a.txt": b"text"})
    with pytest.raises(UserError, match=r"t\.tar' has no pictures"):
        opened(pairs=f"{tmp_path}/t.tar")
    (tmp_path / "t.tar.gz").write_bytes(b"")
    for pattern in ("t.tar.gz", "*.tar.gz"):
        with pytest.raises(UserError, match="is a packed tar"):
            opened(pairs=f"{tmp_path}/{pattern}")
