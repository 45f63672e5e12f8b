"""What a run will take is estimated before it runs, and a run that cannot fit is refused before any work."""

import io
import json
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.errors import UserError
from cluster.storage import Folder
from ingest import scenes
from ingest.config import ImagesConfig
from ingest.scene_server import scene_rows, write_scene_tables
from ingest.sources import Estimate
from pipeline.config import RunConfig, load_recipe
from pipeline.estimate import estimate_data, picture_bytes, source_rows
from pipeline.preflight import preflight
from pipeline.sources import RunSources
from tests.pipeline.small_run import Pair, SmallRun, commit_images

MISSING = {"pairs": "missing", "images": "missing", "embeddings": "missing", "view": "missing"}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "t.parquet"
    rows = {"url": [f"http://a.org/{n}.jpg" for n in range(10_000)], "caption": [f"caption {n}" for n in range(10_000)]}
    pq.write_table(pa.table(rows), path)
    return path


def config_of(table: Path, *more: str) -> RunConfig:
    settings = ["source.scenes=null", "evaluation_sets=[]", f"source.pairs={table}", "images.size=256"]
    return load_recipe("tiny", [*settings, "images.shard_rows=100", *more])


def disk(monkeypatch: pytest.MonkeyPatch, *, free: int, files: int = 10**9, counts_files: bool = True) -> None:
    """A disk with so much room, wherever one looks."""
    said = SimpleNamespace(f_bavail=free // 4096, f_frsize=4096, f_favail=files, f_files=10**9 if counts_files else 0)
    monkeypatch.setattr(os, "statvfs", lambda path: said)


def check(config: RunConfig, folder: Folder, states: dict[str, str] | None = None) -> list[str]:
    return preflight(config, folder, states or MISSING, RunSources(config, folder))


def test_room_enough_is_no_word_worth(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk(monkeypatch, free=10**12)
    assert check(config_of(table), Folder(tmp_path / "run")) == []


def test_a_disk_too_small_is_refused_with_both_numbers_and_the_remedy(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk(monkeypatch, free=100_000_000)
    with pytest.raises(UserError, match=r"needs about 300\.8 MB in 924 files \(.*images.*100\.0 MB free.*--out"):
        check(config_of(table), Folder(tmp_path / "run"))


def test_a_tight_disk_is_told_and_not_refused(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk(monkeypatch, free=200_000_000)
    (line,) = check(config_of(table), Folder(tmp_path / "run"))
    assert "may not fit" in line and "200.0 MB free" in line


def test_too_few_inodes_are_refused(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk(monkeypatch, free=10**12, files=500)
    with pytest.raises(UserError, match=r"room for 500 files more \(inodes\).*images\.shard_rows"):
        check(config_of(table), Folder(tmp_path / "run"))
    disk(monkeypatch, free=10**12, files=0, counts_files=False)
    assert check(config_of(table), Folder(tmp_path / "run")) == [], "some filesystems have no inodes to count"


def test_an_object_store_is_told_what_will_come(table: Path) -> None:
    (line,) = check(config_of(table), Folder("memory://bucket/run"))
    assert "bucket/run: about 300.8 MB in 924 files" in line and "will be written" in line


def test_what_is_current_or_done_needs_no_room(tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = SmallRun(tmp_path / "run", [Pair(f"http://a.org/{n}.jpg", "x") for n in range(20)])
    run.path.mkdir()
    pairs = run.build_pairs("pairs", run.rows)
    workshop = run.begin_images("images", pairs)
    config = config_of(table, "images.shard_rows=2500")
    disk(monkeypatch, free=100_000_000)
    states = {"pairs": "current", "images": "missing"}
    with pytest.raises(UserError):
        check(config, run.folder, states)
    for shard in range(3):
        commit_images(workshop, pairs, shard)
    assert check(config, run.folder, states) == [], "three of four shards are there"
    assert check(config, run.folder, dict.fromkeys(MISSING, "current")) == []


def test_growth_needs_room_for_its_rows_alone(tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = SmallRun(tmp_path / "run", [Pair(f"http://a.org/{n}.jpg", "x") for n in range(4000)])
    run.path.mkdir()
    run.build_images("images", run.build_pairs("pairs", run.rows[:50]))
    disk(monkeypatch, free=200_000_000)
    states = {"images": "amend"}
    (line,) = check(config_of(table), run.folder, states)
    assert "may not fit" in line
    manifest = json.loads((run.path / "images" / "manifest.json").read_bytes())
    manifest["totals"]["rows"] = 9000
    (run.path / "images" / "manifest.json").write_text(json.dumps(manifest))
    assert check(config_of(table), run.folder, states) == []


def test_a_retry_needs_room_for_the_shards_that_it_writes_again(
    tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = SmallRun(tmp_path / "run", [Pair(f"http://a.org/{n}.jpg", "x") for n in range(20)])
    run.path.mkdir()
    images = run.build_images("images", run.build_pairs("pairs", run.rows))
    config = config_of(table)
    written = sum(file.bytes for entry in images.shards for file in entry.files)
    disk(monkeypatch, free=written // 3 // 4096 * 4096)
    sources = RunSources(config, run.folder)
    monkeypatch.setattr(RunSources, "open", lambda self, name: SimpleNamespace(estimate=lambda: Estimate(20, 0)))
    assert preflight(config, run.folder, {"images": "amend"}, sources, ()) == []
    with pytest.raises(UserError, match="still needs about"):
        preflight(config, run.folder, {"images": "amend"}, sources, ("ok",))


def test_rows_of_a_folder_are_known(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.png", "a.txt"):
        (tmp_path / name).write_bytes(b"x")
    config = config_of(tmp_path, "source.pairs=null", f"source.folder={tmp_path}")
    assert source_rows(config, RunSources(config, Folder(tmp_path / "run"))) == ({"pairs": 2}, [])


def test_rows_of_scenes_are_known_exactly(tmp_path: Path) -> None:
    config = load_recipe("tiny", ["source.scenes.count=2"])
    assert config.source.scenes is not None
    for name, path in write_scene_tables(tmp_path, config.source.scenes).items():
        assert pq.read_metadata(path).num_rows == scene_rows(config.source.scenes, name), name
    rows, unknown = source_rows(config, RunSources(config, Folder(tmp_path / "run")))
    assert rows == {"pairs": 6, "evaluation/heldout_captions/pairs": 16, "evaluation/copies/pairs": 12}
    assert unknown == [] and not (tmp_path / "run").exists()


def test_a_source_that_is_not_there_leaves_its_rows_open(tmp_path: Path) -> None:
    config = config_of(tmp_path / "nothing.parquet")
    rows, unknown = source_rows(config, RunSources(config, Folder(tmp_path / "run")))
    assert rows == {} and "nothing.parquet" in unknown[0]
    assert estimate_data(config, rows) == {}


@pytest.mark.parametrize("size", [64, 256, 512])
@pytest.mark.parametrize(("kind", "quality"), [("jpg", 95), ("jpg", 75), ("webp", 75), ("png", 95)])
def test_pictures_lie_about_the_estimate(size: int, kind: Any, quality: int) -> None:
    """Flat colours below it, noise of every frequency above it; nothing is measured with the estimate itself."""
    estimated = picture_bytes(ImagesConfig(size=size, format=kind, quality=quality))
    scene = scenes.draw(scenes.training_scene(0, 1), size)
    noise = Image.frombytes("RGB", (size, size), random.Random(0).randbytes(size * size * 3))
    assert encoded(scene, kind, quality) < estimated < encoded(noise, kind, quality)


def test_scenes_are_estimated_within_a_factor_of_two() -> None:
    for size in (64, 128, 256):
        pictures = [scenes.draw(scenes.training_scene(0, index), 256).resize((size, size)) for index in range(20)]
        mean = sum(encoded(picture, "jpg", 95) for picture in pictures) / len(pictures)
        assert mean / 2 < picture_bytes(ImagesConfig(size=size), scenes=True) < mean * 2, size


def encoded(picture: Image.Image, kind: str, quality: int) -> int:
    packed = io.BytesIO()
    picture.save(packed, {"jpg": "JPEG", "webp": "WEBP", "png": "PNG"}[kind], quality=quality)
    return len(packed.getvalue())


@pytest.mark.slow
def test_the_plan_tells_rows_bytes_and_files_with_and_without_a_source(unclip: Any) -> None:
    planned = json.loads(unclip("plan", "tiny", "--json").stdout)
    stages = {stage["name"]: stage for stage in planned["stages"]}
    assert stages["images"]["rows"] == 201 and stages["images"]["files"] == 5 * 3 + 6
    assert stages["prior"]["scratch_bytes"] == 12 * stages["prior"]["bytes"] > 0
    text = unclip("plan", "dalle2")
    assert text.returncode == 0 and "source.pairs is not set" in text.stdout and "1,324,964,864" in text.stdout
