"""The loop on real gangs: torchrun, gloo, DeepSpeed. Few starts, as each imports all of it; many jobs a start."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from cluster.workshop import Workshop
from embed.clip import load_encoder

Job = dict[str, Any]
Build = Callable[..., Job]

VARIANTS: dict[str, dict[str, Any]] = {
    "zero-0": {"deepspeed": {"zero_stage": 0}},
    "zero-1": {"deepspeed": {"zero_stage": 1}},
    "zero-2": {"deepspeed": {"zero_stage": 2}},
    "zero-3": {"deepspeed": {"zero_stage": 3}},
    "zero-1-bf16": {"deepspeed": {"zero_stage": 1, "precision": "bf16"}},
    "zero-0-bf16": {"deepspeed": {"zero_stage": 0, "precision": "bf16"}},
    "zero-3-bf16": {"deepspeed": {"zero_stage": 3, "precision": "bf16"}},
}
FAST = ("zero-1", "zero-3-bf16")
OTHERS = tuple(name for name in VARIANTS if name not in FAST)
EXACT = ("model.safetensors", "history.parquet", "encoder.json", "seen.json")


def run_gang(folder: Path, world_size: int, jobs: list[Job], *, dies: bool = False) -> list[dict[str, Any]]:
    """Run the jobs on `world_size` fresh processes."""
    file = folder / f"jobs-{len(list(folder.iterdir()))}.json"
    file.write_text(json.dumps(jobs))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [*launch, str(Path(__file__).with_name("gang.py")), str(file)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    if dies:
        assert done.returncode != 0
        return []
    assert done.returncode == 0, done.stderr[-4000:]
    results: list[dict[str, Any]] = json.loads(file.with_suffix(".results").read_text())
    return results


def contents(job: Job) -> dict[str, bytes]:
    folder = Path(job["out"]["uri"])
    return {name: (folder / name).read_bytes() for name in EXACT}


def curve(job: Job, column: str = "loss") -> np.ndarray:
    return pq.read_table(Path(job["out"]["uri"]) / "history.parquet")[column].to_numpy()


def weights(job: Job) -> dict[str, np.ndarray]:
    return load_file(Path(job["out"]["uri"]) / "model.safetensors")


@pytest.fixture(scope="module")
def trained(build: Build, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train_variants(build, tmp_path_factory.mktemp("gangs"), FAST)


@pytest.fixture(scope="module")
def trained_in_other_layouts(build: Build, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train_variants(build, tmp_path_factory.mktemp("gangs"), OTHERS)


def train_variants(build: Build, folder: Path, variants: tuple[str, ...]) -> dict[str, Any]:
    """Each variant on two processes: undisturbed; from its own checkpoint of step 8; and from that on one process."""
    straight, resumed, alone = {}, {}, {}
    for name in variants:
        training = VARIANTS[name]
        straight[name] = build(folder / name, **training)
        resumed[name], alone[name] = build(folder / f"{name}-2", **training), build(folder / f"{name}-1", **training)
        straight[name]["snapshot"] = {"at": 9, "to": Workshop.from_plain(resumed[name]["out"]).work.uri}
        resumed[name]["snapshot"] = {"at": 10, "to": Workshop.from_plain(alone[name]["out"]).work.uri}
    two = run_gang(folder, 2, [job for name in variants for job in (straight[name], resumed[name])])
    single = build(folder / "single")
    one = run_gang(folder, 1, [*alone.values(), single])
    assert [result["steps"] for result in two] == [12, 4] * len(variants)
    assert [result["steps"] for result in one] == [4] * len(variants) + [12]
    return {"straight": straight, "resumed": resumed, "alone": alone, "single": single}


def assert_resumes_exactly(trained: dict[str, Any], variant: str) -> None:
    assert contents(trained["resumed"][variant]) == contents(trained["straight"][variant])


def assert_same_curve_at_another_world_size(trained: dict[str, Any], variant: str) -> None:
    straight, alone = trained["straight"][variant], trained["alone"][variant]
    tolerance = 2e-2 if "bf16" in variant else 1e-4
    np.testing.assert_allclose(curve(alone), curve(straight), rtol=tolerance)
    for name, value in weights(straight).items():
        np.testing.assert_allclose(weights(alone)[name], value, atol=5 * tolerance, err_msg=name)


@pytest.mark.parametrize("variant", FAST)
def test_resume_at_the_same_world_size_gives_the_same_bytes(trained: dict[str, Any], variant: str) -> None:
    assert_resumes_exactly(trained, variant)


@pytest.mark.parametrize("variant", FAST)
def test_resume_at_another_world_size_follows_the_same_curve(trained: dict[str, Any], variant: str) -> None:
    assert_same_curve_at_another_world_size(trained, variant)


@pytest.mark.slow
@pytest.mark.parametrize("variant", OTHERS)
def test_every_other_layout_resumes_as_well(trained_in_other_layouts: dict[str, Any], variant: str) -> None:
    assert_resumes_exactly(trained_in_other_layouts, variant)
    assert_same_curve_at_another_world_size(trained_in_other_layouts, variant)


@pytest.mark.slow
def test_every_zero_stage_follows_the_same_curve(
    trained: dict[str, Any], trained_in_other_layouts: dict[str, Any]
) -> None:
    for variant in ("zero-0", "zero-2", "zero-3"):
        other = trained_in_other_layouts["straight"][variant]
        np.testing.assert_allclose(curve(other), curve(trained["straight"]["zero-1"]), rtol=1e-4, err_msg=variant)


def test_one_process_follows_the_curve_of_two(trained: dict[str, Any]) -> None:
    single, two = trained["single"], trained["straight"]["zero-1"]
    for column in ("loss", "grad_norm", "accuracy"):
        np.testing.assert_allclose(curve(single, column), curve(two, column), rtol=1e-3, err_msg=column)


def test_artifact_of_a_trained_clip_is_a_readable_encoder(trained: dict[str, Any]) -> None:
    job = trained["straight"]["zero-3-bf16"]
    artifact = Workshop.from_plain(job["out"]).publish(1)
    encoder = load_encoder(artifact.uri)
    tokens, _ = encoder.tokenize(["a small red circle"])
    assert encoder.encode_text(tokens).shape == (1, 16)
    seen = json.loads(artifact.file("seen.json").read_bytes())
    assert seen["rows"] + seen["left_out"] == 90


def test_kill_in_mid_training_then_resume_gives_the_same_bytes(
    trained: dict[str, Any], build: Build, tmp_path: Path
) -> None:
    job = build(tmp_path / "killed")
    run_gang(tmp_path, 2, [{**job, "kill_at": 7}], dies=True)
    broken = build(tmp_path / "broken", learning_rate=1e30, warmup_steps=0)
    starved = build(tmp_path / "starved", batch_size=15)
    results = run_gang(tmp_path, 2, [job, job, broken, starved])
    assert [result.get("steps") for result in results[:2]] == [8, 0]
    assert contents(job) == contents(trained["straight"]["zero-1"])
    assert results[2]["kind"] == "WorkFailed"
    assert "at step" in results[2]["error"]
    assert "pair_id" in results[2]["error"]
    assert results[3]["kind"] == "UserError"
    assert "batch_size is 15" in results[3]["error"]
