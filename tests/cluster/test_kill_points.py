"""SIGKILL at every single step of the protocol, and a disk that fills up there.

Every call with which a process changes a disk is a step (`protocol_steps` has the list and the process's life): also
between data and receipt, receipt and settle, the moves of a shard's two files, `shards.parquet` and the manifest, in
the middle of discarding and of collecting.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.protocol_steps import ONE_THREAD

ROOT = Path(__file__).parents[2]
TOO_LARGE = """
import resource, sys
from pathlib import Path
from cluster.environment import environment
from cluster.storage import Folder
from cluster.workshop import begin
from tests.cluster.shard_worker import REQUEST, commit
workshop = begin(Folder(sys.argv[1]), REQUEST, environment())
commit(workshop, 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with workshop.attempt(1) as attempt:
    with attempt.path("00000001.tar").open("wb") as file:
        for _ in range(100):
            file.write(bytes(10_000))
"""


def swept(folder: Path, how: str, stride: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.cluster.protocol_steps", str(folder), how, str(stride), "20"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, env=os.environ | ONE_THREAD)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.slow
def test_killed_at_any_step_a_life_goes_on_to_the_same_bytes_and_leaves_no_orphan(tmp_path: Path) -> None:
    result = swept(tmp_path, "kill", stride=3)
    assert result["faults"] == []
    assert result["stopped"] * 3 >= result["steps"] > 400


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_step_is_told_and_costs_only_what_was_not_done(tmp_path: Path) -> None:
    result = swept(tmp_path, "full", stride=7)
    assert result["faults"] == []
    assert result["stopped"] >= result["steps"] // 7 > 60


def test_a_file_that_the_kernel_refuses_to_grow_ends_in_words(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", TOO_LARGE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("cluster.errors.WorkFailed: no space left for ") and "Free some on that disk" in last
    assert (tmp_path / "receipts" / "00000000.json").exists()
    assert list((tmp_path / ".staging").iterdir()) == []
