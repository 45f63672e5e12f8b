"""Killing a run loses nothing. A sample of what `make kills` does, and the same for the stages after it."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.kills import VICTIMS, disturb, kill_session

pytestmark = pytest.mark.slow

SETTINGS = ["--until", "embeddings", "--set", "clip.training.steps=600", "--set", "clip.training.checkpoint_every=20"]
SAMPLE, KILLS = 9, 5
# (stage, seconds after its start within which the kill falls): starting Ray and its processes is part of a stage
MOMENTS = [("clip", 11.0)] * 3 + [("embeddings", 8.0)] * 2
ARTIFACTS = ("pairs", "images", "clip", "embeddings")


def test_images_have_the_same_bytes_whoever_was_killed_on_the_way(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"random seed {seed}")
    record = disturb(tmp_path, SAMPLE, seed)
    assert len(record.kills) == SAMPLE and {kill.victim for kill in record.kills} == set(VICTIMS)
    assert record.files > 0 and record.rows > 600
    assert record.differing == []


def content(run: Path) -> dict[str, bytes]:
    """The bytes of all that is content: not the receipts, which record hosts, times and attempts."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for name in ARTIFACTS
        for path in sorted((run / name).rglob("*"))
        if path.is_file() and path.parent.name != "receipts"
    }


def begun(run: Path, stage: str) -> bool:
    """Has the driver of this moment begun `stage`, or found it done?"""
    try:
        stages = json.loads((run / "progress.json").read_bytes())["stages"]
    except FileNotFoundError:
        return False
    return any(entry["name"] == stage and entry["state"] != "waiting" for entry in stages)


def kill_in(unclip: Any, run: Path, stage: str, delay_s: float) -> int | None:
    """Start the run, wait for `stage`, then a little longer, and kill it. → exit code."""
    (run / "progress.json").unlink(missing_ok=True)
    process: subprocess.Popen[str] = unclip.start("run", "tiny", "--out", str(run), *SETTINGS)
    while not begun(run, stage) and process.poll() is None:
        time.sleep(0.02)
    deadline = time.monotonic() + delay_s
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    kill_session(process.pid)
    process.communicate()
    return process.returncode


def test_a_run_killed_at_random_moments_ends_with_the_bytes_of_an_undisturbed_one(unclip: Any, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"random seed {seed}")
    rng = random.Random(seed)
    undisturbed = unclip("run", "tiny", "--out", str(tmp_path / "whole"), *SETTINGS)
    assert undisturbed.returncode == 0, undisturbed.stderr
    runs, codes = [tmp_path / "killed-0"], []
    for number in range(2 * KILLS):
        stage, within_s = MOMENTS[number % len(MOMENTS)]
        codes.append(kill_in(unclip, runs[-1], stage, rng.uniform(0.0, within_s)))
        if codes.count(-signal.SIGKILL) == KILLS:
            break
        if codes[-1] == 0:  # it came through before its kill: the rest of the kills go to another run
            runs.append(tmp_path / f"killed-{len(runs)}")
    assert codes.count(-signal.SIGKILL) == KILLS and set(codes) <= {0, -signal.SIGKILL}, codes
    whole = content(tmp_path / "whole")
    for run in runs:
        finished = unclip("run", "tiny", "--out", str(run), *SETTINGS)
        assert finished.returncode == 0, finished.stderr
        killed = content(run)
        assert whole.keys() == killed.keys()
        assert [name for name in whole if whole[name] != killed[name]] == []
