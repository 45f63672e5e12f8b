"""Checkpoints by themselves: shares written by some ranks, read as others own them; what is broken is passed over."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cluster.errors import UserError
from cluster.storage import Folder
from train.checkpoint import MARKER, Checkpoint, Checkpoints
from train.shares import Share

STATES = ("master", "exp_avg", "exp_avg_sq", "ema")
PARAMETERS = {"blocks.0.weight": 35, "blocks.0.bias": 7, "head": 1}
TRAINED = {"family": "clip", "seed": 1}


def values(step: int) -> dict[tuple[str, str], Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {(s, n): torch.randn(size, generator=generator) for s in STATES for n, size in PARAMETERS.items()}


def shares_of(rank: int, world_size: int, step: int) -> list[Share]:
    """The parameters laid end to end and cut into equal pieces, as ZeRO 1 does."""
    total = sum(PARAMETERS.values())
    piece = -(-total // world_size)
    shares, offset, known = [], 0, values(step)
    for name, size in PARAMETERS.items():
        low, high = max(offset, rank * piece), min(offset + size, (rank + 1) * piece)
        if low < high:
            part = slice(low - offset, high - offset)
            shares.append(Share(name, low - offset, {s: known[s, name][part] for s in STATES}, written=True))
        offset += size
    return shares


def write(checkpoints: Checkpoints, step: int, world_size: int) -> None:
    files = dict(
        checkpoints.write_share(step, rank, world_size, shares_of(rank, world_size, step)) for rank in range(world_size)
    )
    history = [{"step": float(i + 1), "loss": 1 / (i + 3)} for i in range(step)]
    checkpoints.complete(step, files, trained=TRAINED, history=history)


def newest(checkpoints: Checkpoints) -> Checkpoint:
    found, _ = checkpoints.newest()
    assert found is not None
    return found


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(Folder(tmp_path / "checkpoints"))


@pytest.mark.parametrize("written_by", [1, 2, 3])
@pytest.mark.parametrize("read_by", [1, 2, 4])
def test_a_checkpoint_is_read_at_any_world_size(checkpoints: Checkpoints, written_by: int, read_by: int) -> None:
    write(checkpoints, 4, written_by)
    found = newest(checkpoints)
    for rank in range(read_by):
        for share in shares_of(rank, read_by, 4):
            for state, expected in share.tensors.items():
                assert torch.equal(found.read(state, share.name, share.start, share.length), expected)


def test_step_history_and_what_was_trained_come_back(checkpoints: Checkpoints) -> None:
    write(checkpoints, 4, 2)
    found = newest(checkpoints)
    assert (found.step, found.trained) == (4, TRAINED)
    assert found.history() == [{"step": float(i + 1), "loss": 1 / (i + 3)} for i in range(4)]


def test_the_last_two_are_kept(checkpoints: Checkpoints) -> None:
    for step in (2, 4, 6):
        write(checkpoints, step, 2)
    assert checkpoints.steps() == [4, 6]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "rank-00001-of-00002.safetensors").unlink(),
        lambda folder: (folder / MARKER).unlink(),
        lambda folder: (folder / MARKER).write_bytes(b'{"format": 1, "st'),
        lambda folder: _flip_last_byte(folder / "rank-00000-of-00002.safetensors"),
        lambda folder: _flip_last_byte(folder / "history.safetensors"),
    ],
    ids=["file missing", "never completed", "marker cut", "weights flipped", "history flipped"],
)
def test_a_broken_checkpoint_is_passed_over_for_the_one_before(checkpoints: Checkpoints, damage) -> None:  # type: ignore[no-untyped-def]
    write(checkpoints, 4, 2)
    write(checkpoints, 6, 2)
    damage(Path(checkpoints.folder.uri) / "checkpoint-00000006")
    found, passed_over = checkpoints.newest()
    assert found is not None
    assert found.step == 4
    assert len(passed_over) == 1
    write(checkpoints, 6, 1)
    assert newest(checkpoints).step == 6


def test_where_none_is_whole_training_begins_anew(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest() == (None, [])


def test_a_parameter_that_is_not_there_or_larger_is_another_model(checkpoints: Checkpoints) -> None:
    write(checkpoints, 4, 2)
    with pytest.raises(UserError, match=r"7 of the 8 elements wanted of ema of 'blocks\.0\.bias'"):
        newest(checkpoints).read("ema", "blocks.0.bias", 0, 8)
    with pytest.raises(UserError, match="another model"):
        newest(checkpoints).read("ema", "tail", 0, 1)


def _flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
