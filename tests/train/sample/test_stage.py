import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.artifact import Artifact, Request
from cluster.storage import Folder
from cluster.workshop import Workshop, begin
from tests.train.sample.conftest import SAMPLES, publish_cache
from train.families.config import SamplesConfig
from train.sample.heldout import heldout_sets, training_set
from train.sample.stage import sample_captions

GANG = """
import json, sys
import torch.distributed as dist
from train.sample.stage import member
member(json.loads(sys.argv[1]), lambda report: None)
dist.barrier()
dist.destroy_process_group()
"""


def width_of(path: Path) -> int:
    with Image.open(path) as picture:
        return picture.width


def draw(world: dict[str, str], folder: Path, processes: int, config: SamplesConfig = SAMPLES) -> Artifact:
    """Run the stage on a gang of real processes and publish what it made."""
    workshop = begin(Folder(folder), Request("samples", 1, {}, {}), {})
    payload = {"config": config.model_dump(mode="json"), "seed": 5, "inputs": world, "out": workshop.plain()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    gang = [
        subprocess.Popen(
            [sys.executable, "-c", GANG, json.dumps(payload)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        )
        for rank in range(processes)
    ]
    assert [process.wait(timeout=300) for process in gang] == [0] * processes
    return Workshop.from_plain(workshop.plain()).publish(1)


@pytest.mark.slow
def test_any_number_of_processes_draws_the_same_samples(world, tmp_path):
    one, two = (draw(world, tmp_path / str(count), count) for count in (1, 2))
    assert one.content_digest == two.content_digest
    pictures = pq.read_table(two.file("pictures.parquet")).to_pylist()
    assert [(row["set"], row["mode"]) for row in pictures[::6]] == [
        ("heldout", "prior"),
        ("heldout", "text_embedding"),
        ("heldout", "caption"),
    ]
    assert {Image.open(io.BytesIO(row["png"])).size for row in pictures} == {(64, 64)}
    assert len({(row["caption"], row["seed"]) for row in pictures}) == 6
    scores = json.loads(two.file("scores.json").read_bytes())
    assert scores["sizes"] == [16, 32, 64]
    for mode in SAMPLES.modes:
        share = scores["oracle"]["heldout"][mode]["final"]["background"]
        assert share["low"] <= share["accuracy"] <= share["high"] and share["total"] == 6
    assert set(scores["probe"]["heldout"]) == {"z_i", "z_t", "prior"}
    assert scores["retrieval"]["heldout"]["rows"] == 20
    assert width_of(two.file("grid.png")) > 3 * 144


def test_captions_that_are_no_scenes_are_drawn_without_an_oracle(world, tmp_path):
    other = {
        **world,
        "evaluation/heldout/embeddings": publish_cache(tmp_path / "emoji", ["grinning face", "red heart"]),
    }
    scores = json.loads(draw(other, tmp_path / "samples", 1).file("scores.json").read_bytes())
    assert scores["oracle"] is None and scores["probe"] is None
    assert scores["retrieval"]["heldout"]["rows"] == 2


def test_without_an_evaluation_set_the_validation_split_is_drawn(world):
    alone = {name: uri for name, uri in world.items() if not name.startswith("evaluation/")}
    (found,) = heldout_sets(alone, SAMPLES)
    assert found.name == "validation"
    training = training_set(alone, rows=1_000)
    assert len(found) + len(training) == 80 and len(found) > 5


def test_sampling_captions_writes_a_grid(world, tmp_path):
    payload = {
        "config": SAMPLES.model_dump(mode="json"),
        "captions": ["a large red star at the top left on a white background", "two words " * 30, "a cat"],
        "seed": 3,
        "inputs": world,
        "out": str(tmp_path / "grid.png"),
    }
    reports: list[dict] = []
    assert sample_captions(payload, reports.append) == {"rows": 3}
    assert width_of(tmp_path / "grid.png") > 3 * 256
    assert reports[-1] == {"done": 3, "total": 3, "unit": "pictures"}
