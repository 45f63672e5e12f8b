import io
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.errors import UserError
from ingest import scenes
from ingest.scene_server import Misbehaviour, SceneServer, misbehaving_rows, scene_url, write_scene_tables
from ingest.source_config import ScenesConfig
from tests.ingest.conftest import free_port

CONFIG = {"count": 300, "picture_size": 64, "heldout_captions": 8, "heldout_pairs": 8, "copies": 12}


@pytest.fixture
def config() -> ScenesConfig:
    return ScenesConfig(**CONFIG, port=free_port())


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as response:
        return bytes(response.read())


def test_every_kind_of_misbehaviour_happens_on_a_few_rows_fixed_by_the_seed():
    config = ScenesConfig(count=4000)
    rows = misbehaving_rows(config)
    assert rows == misbehaving_rows(config)
    assert sorted(rows.values()) == sorted(kind for kind in Misbehaviour for _ in range(4))
    assert misbehaving_rows(ScenesConfig(count=4000, misbehaving_share=0)) == {}


def test_tables_name_pictures_that_the_server_draws(tmp_path: Path, config: ScenesConfig):
    paths = write_scene_tables(tmp_path, config)
    training = pq.read_table(paths["training"]).to_pylist()
    assert len(training) == 300 + 5
    assert training[-1]["url"] is None and training[-2]["caption"] is None and training[-3] == training[2]
    misbehaving = misbehaving_rows(config)
    with SceneServer(config):
        for name, path in paths.items():
            for index, row in enumerate(pq.read_table(path).to_pylist()[:8]):
                if name == "training" and index in misbehaving:
                    continue
                scenes.parse_caption(row["caption"])
                assert Image.open(io.BytesIO(get(row["url"]))).size == (64, 64)
        for missing in ("training/zzz.jpg", "nothing/0000000.jpg"):
            with pytest.raises(urllib.error.HTTPError, match="404") as caught:
                get(f"http://127.0.0.1:{config.port}/{missing}")
            caught.value.close()


def test_copies_tell_their_origin(tmp_path: Path, config: ScenesConfig):
    copies = pq.read_table(write_scene_tables(tmp_path, config)["copies"]).to_pylist()
    training = {row["url"]: row["caption"] for row in pq.read_table(tmp_path / "training.parquet").to_pylist()}
    copied = [row for row in copies if row["copy_of"] is not None]
    assert len(copied) == 6
    assert all(training[row["copy_of"]] == row["caption"] and row["transform"] for row in copied)


def test_equal_settings_write_equal_tables(tmp_path: Path, config: ScenesConfig):
    first, second = (write_scene_tables(tmp_path / name, config) for name in ("a", "b"))
    for name in first:
        assert Path(first[name]).read_bytes() == Path(second[name]).read_bytes()


def test_a_taken_port_is_one_clear_error(config: ScenesConfig):
    with SceneServer(config), pytest.raises(UserError, match=rf"source\.scenes\.port {config.port} is taken"):
        SceneServer(config).start()


def test_the_server_outlives_a_killed_driver_by_some_seconds_and_the_next_one_waits_for_it(config: ScenesConfig):
    script = (
        "import sys, time\nfrom ingest.source_config import ScenesConfig\nfrom ingest.scene_server import SceneServer\n"
        "server = SceneServer(ScenesConfig.model_validate_json(sys.argv[1]))\nserver.start()\n"
        "print(server.pid, flush=True)\ntime.sleep(60)\n"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", script, config.model_dump_json()], stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    with driver.stdout:
        server = psutil.Process(int(driver.stdout.readline()))
        get(scene_url(config, "heldout_pairs", 0))
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    get(scene_url(config, "heldout_pairs", 0))
    with SceneServer(config) as next_server:
        assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE
        get(scene_url(config, "heldout_pairs", 0))
        last = psutil.Process(next_server.pid)
    assert not last.is_running() or last.status() == psutil.STATUS_ZOMBIE
