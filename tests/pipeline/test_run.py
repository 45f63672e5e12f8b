"""One complete run of every stage, and what one does with it afterwards."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.artifact import Artifact

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden.json"
NO_RAY = ["--set", "cluster.address=127.0.0.1:1"]  # nothing answers there: whoever starts Ray fails


@pytest.fixture(scope="module")
def run(unclip: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "run"
    done = unclip("run", "tiny", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert f"samples: {out}/samples/grid.png" in done.stderr and f"report: {out}/report/report.html" in done.stderr
    return out


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_every_row_of_the_source_ends_in_exactly_one_state(run: Path) -> None:
    source = pq.read_table(run / "source" / "training.parquet")
    images = Artifact.open(str(run / "images"))
    ledger = [
        row for entry in images.shards for row in pq.read_table(images.file(f"{entry.shard:08d}.parquet")).to_pylist()
    ]
    assert sorted(row["source_row"] for row in ledger) == list(range(source.num_rows))
    states = {(row["status"], row["reason"]) for row in ledger}
    assert states >= {
        ("ok", None),
        ("duplicate", None),
        ("fetch_failed", "http_404"),
        ("fetch_failed", "connection_cut"),
        ("fetch_failed", "too_slow"),
        ("refused", "address_private"),
        ("refused", "body_too_large"),
        ("refused", "url_missing"),
        ("undecodable", "html"),
        ("undecodable", "corrupt_image"),
    }


def test_embeddings_are_the_ok_rows_in_order(run: Path) -> None:
    images, embeddings = Artifact.open(str(run / "images")), Artifact.open(str(run / "embeddings"))
    for entry in images.shards:
        name = f"{entry.shard:08d}.parquet"
        ledger = pq.read_table(images.file(name), columns=["key", "status"]).to_pylist()
        keys = pq.read_table(embeddings.file(name), columns=["key"])["key"].to_pylist()
        assert keys == [row["key"] for row in ledger if row["status"] == "ok"]


def test_code_versions_guard_the_bytes(run: Path) -> None:
    """Where this fails, the output of a stage has changed: raise its code version in pipeline/stages.py, and then
    write the new pair here. A code version that stays would leave old caches looking current."""
    found = {}
    for name in ("pairs", "images", "evaluation/copies/images"):
        artifact = Artifact.open(str(run / name))
        found[name] = [artifact.manifest.identity["code_version"], artifact.content_digest]
    assert found == json.loads(GOLDEN.read_text())


def test_a_second_run_does_nothing_and_starts_no_ray(run: Path, unclip: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    done = unclip("run", "tiny", "--out", str(run), *NO_RAY)
    assert done.returncode == 0 and "nothing to do, 19 stages are current" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_until_builds_what_the_stage_needs_and_no_more(unclip: Any, tmp_path: Path) -> None:
    assert unclip("run", "tiny", "--out", str(tmp_path / "run"), "--until", "pairs").returncode == 0
    assert [path.parent.name for path in (tmp_path / "run").rglob("manifest.json")] == ["pairs"]


def test_verify_finds_a_sound_run_sound(run: Path, unclip: Any) -> None:
    done = unclip("verify", str(run), "--sample", "all", "--json")
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout)
    assert found["findings"] == [] and len(found["artifacts"]) == 19


def test_verify_names_the_file_of_a_flipped_bit(copy: Path, unclip: Any) -> None:
    path = copy / "images" / "00000002.tar"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    done = unclip("verify", str(copy / "images"), "--json")
    assert done.returncode == 1
    assert [finding["detail"] for finding in json.loads(done.stdout)["findings"]] == [
        "00000002.tar: its bytes are not those of the receipt"
    ]


def test_status_tells_stages_and_outcomes_and_fails_where_a_file_is_gone(copy: Path, unclip: Any) -> None:
    done = unclip("status", str(copy), "--json")
    status = json.loads(done.stdout)
    assert done.returncode == 0
    assert {stage["state"] for stage in status["stages"]} == {"published"} and status["driver"] is None
    assert status["outcomes"]["ok"] == Artifact.open(str(copy / "images")).manifest.totals["counts"]["ok"]
    assert status["reasons"]["fetch_failed/http_404"] == 1
    (copy / "embeddings" / "00000001.parquet").unlink()
    broken = unclip("status", str(copy))
    assert broken.returncode == 1 and "00000001.parquet: missing" in broken.stdout


def test_sample_draws_the_same_picture_for_the_same_seed(run: Path, unclip: Any, tmp_path: Path) -> None:
    caption = "a large red circle in the centre on a blue background"
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        done = unclip("sample", str(run), caption, "a star", "--out", str(tmp_path / f"{name}.png"), "--seed", seed)
        assert done.returncode == 0, done.stderr
    pictures = {name: (tmp_path / f"{name}.png").read_bytes() for name in "abc"}
    assert pictures["a"] == pictures["b"] != pictures["c"]


def test_sample_refuses_a_wrong_file_name_before_it_loads_anything(run: Path, unclip: Any, tmp_path: Path) -> None:
    done = unclip("sample", str(run), "a star", "--out", str(tmp_path / "a.gif"), timeout_s=30)
    assert done.returncode == 2 and "ends in .png" in done.stderr


def test_the_report_is_one_page_with_everything_inside(run: Path, unclip: Any) -> None:
    path = Path(unclip("report", str(run)).stdout.strip())
    page = path.read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page) == [] and "<script" not in page
    for part in (
        "From rows to pictures",
        "http 404",
        "Spectrum",
        "Overlap with the evaluation sets",
        "full stack",
        "The frozen CLIP",
        "What CLIP saw",
        "torch ",
    ):
        assert part in page, part
    assert page.count("<svg") >= 6


def test_the_grid_is_a_picture(run: Path) -> None:
    with Image.open(run / "samples" / "grid.png") as grid:
        assert min(grid.size) > 300


def test_other_settings_are_refused_and_a_rebuild_takes_what_follows_along(copy: Path, unclip: Any) -> None:
    changed = ["run", "tiny", "--out", str(copy), "--set", "samples.captions=4"]
    refused = unclip(*changed)
    assert refused.returncode == 2 and "settings.captions: 8 → 4" in refused.stderr
    done = unclip(*changed, "--rebuild", "samples")
    assert done.returncode == 0, done.stderr
    assert "building again: samples" in done.stderr and "2 stages built" in done.stderr
    assert Artifact.open(str(copy / "samples")).manifest.revision == 2
    assert Artifact.open(str(copy / "report")).manifest.revision == 2
    assert unclip(*changed, *NO_RAY).returncode == 0


def test_a_rebuild_with_equal_bytes_leaves_everything_downstream_current(copy: Path, unclip: Any) -> None:
    done = unclip("run", "tiny", "--out", str(copy), "--rebuild", "view")
    assert done.returncode == 0 and "1 stages built" in done.stderr, done.stderr
    assert Artifact.open(str(copy / "view")).manifest.revision == 2
    assert unclip("verify", str(copy)).returncode == 0


def test_a_rebuild_that_was_killed_goes_on_and_one_that_was_given_up_changes_nothing(copy: Path, unclip: Any) -> None:
    changed = ["run", "tiny", "--out", str(copy), "--set", "dedup.threshold=0.5", "--until", "dedup"]
    request = json.loads((copy / "dedup" / "request.json").read_bytes())
    request["identity"]["settings"]["threshold"] = 0.5
    (copy / "dedup" / "request-r2.json").write_text(json.dumps(request))  # all that a kill right after the start leaves
    given_up = unclip("run", "tiny", "--out", str(copy), *NO_RAY)
    assert given_up.returncode == 0 and "nothing to do" in given_up.stderr, given_up.stderr
    gone_on = unclip(*changed)
    assert gone_on.returncode == 0 and "1 stages built" in gone_on.stderr, gone_on.stderr
    assert Artifact.open(str(copy / "dedup")).manifest.identity["settings"]["threshold"] == 0.5
