"""Wrong requests: one clear line, exit code 2, and nothing done."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.lease import Lease
from cluster.storage import Folder

TINY_TABLE = ["--set", "source.scenes=null", "--set", "evaluation_sets=[]"]


def refused(unclip: Any, *arguments: str) -> str:
    done = unclip(*arguments, timeout_s=60)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines: list[str] = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    return lines[0]


def run_on(unclip: Any, tmp_path: Path, table: Path, *more: str) -> str:
    out = tmp_path / "run"
    line = refused(unclip, "run", "tiny", "--out", str(out), *TINY_TABLE, "--set", f"source.pairs={table}", *more)
    assert not list(out.rglob("*.parquet")), "nothing was done"
    return line


def write(path: Path, **columns: list[Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_a_missing_column_is_told_which_there_are(unclip: Any, tmp_path: Path) -> None:
    line = run_on(unclip, tmp_path, write(tmp_path / "t.parquet", link=["http://a/b.jpg"], caption=["a"]))
    assert "'url'" in line and "'link', 'caption'" in line


def test_a_caption_column_of_numbers(unclip: Any, tmp_path: Path) -> None:
    line = run_on(unclip, tmp_path, write(tmp_path / "t.parquet", url=["http://a/b.jpg"], caption=[3]))
    assert "caption" in line and "int64" in line


def test_an_empty_table(unclip: Any, tmp_path: Path) -> None:
    table = pa.table({"url": pa.array([], pa.string()), "caption": pa.array([], pa.string())})
    pq.write_table(table, tmp_path / "t.parquet")
    assert "no rows" in run_on(unclip, tmp_path, tmp_path / "t.parquet")


def test_an_unreadable_file(unclip: Any, tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no more")
    assert "t.parquet" in run_on(unclip, tmp_path, tmp_path / "t.parquet")


def test_a_file_that_is_not_there(unclip: Any, tmp_path: Path) -> None:
    assert "t.parquet" in run_on(unclip, tmp_path, tmp_path / "t.parquet")


def test_no_source_at_all(unclip: Any, tmp_path: Path) -> None:
    line = refused(unclip, "run", "tiny", "--out", str(tmp_path / "run"), *TINY_TABLE)
    assert "source.pairs is not set" in line


def test_an_unknown_key(unclip: Any, tmp_path: Path) -> None:
    line = refused(unclip, "run", "tiny", "--out", str(tmp_path / "run"), "--set", "images.sise=3")
    assert "images.sise is not a known key" in line
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_cannot_be_written(unclip: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "--out" in refused(unclip, "run", "tiny", "--out", str(tmp_path / "file" / "run"))


def test_an_unknown_stage(unclip: Any, tmp_path: Path) -> None:
    line = refused(unclip, "run", "tiny", "--out", str(tmp_path / "run"), "--until", "image")
    assert "--until 'image' is no stage" in line and "images" in line


def test_a_run_folder_of_another_identity(unclip: Any, tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    assert unclip("run", "tiny", "--out", out, "--until", "pairs").returncode == 0
    line = refused(unclip, "run", "tiny", "--out", out, "--set", "images.shard_rows=7", "--until", "pairs")
    assert "settings.shard_rows: 50 → 7" in line and "--rebuild pairs" in line and "--out" in line


def test_a_second_driver_is_told_who_holds_the_run(unclip: Any, tmp_path: Path) -> None:
    with Lease(Folder(tmp_path / "run")) as lease:
        line = refused(unclip, "run", "tiny", "--out", str(tmp_path / "run"))
        assert f"lease {lease.number}" in line and "is being worked on by process" in line


@pytest.mark.parametrize("command", [["status"], ["report"], ["verify"], ["sample"]])
def test_what_is_not_a_run(unclip: Any, tmp_path: Path, command: list[str]) -> None:
    more = ["a caption", "--out", str(tmp_path / "g.png")] if command == ["sample"] else []
    assert str(tmp_path) in refused(unclip, *command, str(tmp_path), *more)


def test_a_wrong_flag_is_the_users(unclip: Any) -> None:
    done = unclip("run", "tiny", "--outt", "x")
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_plan_works_without_a_source_and_counts_parameters(unclip: Any) -> None:
    done = unclip("plan", "tiny", "--json", *TINY_TABLE)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    names = [model["name"] for model in plan["models"]]
    assert names == ["clip", "prior", "decoder", "upsampler_256", "upsampler_1024"]
    assert all(model["parameters"] > 1_000 for model in plan["models"])
    assert [stage["name"] for stage in plan["stages"]][:3] == ["pairs", "images", "clip"]
