"""Killing a run loses nothing: every process of its session, at random moments, again and again."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.slow

SETTINGS = ["--until", "embeddings", "--set", "clip.training.steps=300", "--set", "clip.training.checkpoint_every=20"]
MOMENTS = ["pairs", "images", "images", "images", "clip", "clip", "clip", "clip", "clip", "embeddings", "embeddings"]
ARTIFACTS = ("pairs", "images", "clip", "embeddings")


def content(run: Path) -> dict[str, bytes]:
    """The bytes of all that is content: not the receipts, which record hosts, times and attempts."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for name in ARTIFACTS
        for path in sorted((run / name).rglob("*"))
        if path.is_file() and path.parent.name != "receipts"
    }


def session_of(leader: int) -> list[psutil.Process]:
    """Every process of the session: Ray's workers have process groups of their own, the session they share."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader:
                found.append(process)
        except (ProcessLookupError, PermissionError):
            continue
    return found


def kill_session(leader: int) -> None:
    while processes := [process for process in session_of(leader) if process.status() != psutil.STATUS_ZOMBIE]:
        for process in processes:
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def reached(run: Path, stage: str) -> bool:
    """Has the driver of this moment begun `stage`, or gone past it?"""
    try:
        stages = json.loads((run / "progress.json").read_bytes())["stages"]
    except FileNotFoundError:
        return False
    return any(entry["name"] == stage and entry["state"] in ("running", "done") for entry in stages)


def kill_in(unclip: Any, run: Path, stage: str, delay_s: float) -> int | None:
    """Start the run, wait for `stage`, then a little longer, and kill it. → exit code."""
    (run / "progress.json").unlink(missing_ok=True)
    process: subprocess.Popen[str] = unclip.start("run", "tiny", "--out", str(run), *SETTINGS)
    deadline = time.monotonic() + 120
    while not reached(run, stage) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(delay_s)
    kill_session(process.pid)
    process.communicate()
    return process.returncode


def test_a_run_killed_at_random_moments_ends_with_the_bytes_of_an_undisturbed_one(unclip: Any, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"random seed {seed}")
    rng = random.Random(seed)
    undisturbed = unclip("run", "tiny", "--out", str(tmp_path / "whole"), *SETTINGS)
    assert undisturbed.returncode == 0, undisturbed.stderr
    codes = [kill_in(unclip, tmp_path / "killed", stage, rng.uniform(0.0, 2.5)) for stage in MOMENTS]
    assert codes.count(-signal.SIGKILL) >= 10, codes
    finished = unclip("run", "tiny", "--out", str(tmp_path / "killed"), *SETTINGS)
    assert finished.returncode == 0, finished.stderr
    whole, killed = content(tmp_path / "whole"), content(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert [name for name in whole if whole[name] != killed[name]] == []
