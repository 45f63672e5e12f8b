"""Keyed random numbers: equal for every number of processes, and drawn from what they say."""

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor

from train.draws import Draws


def every_kind(draws: Draws) -> list[Tensor]:
    return [draws.normal("n", (3, 5)), draws.uniform("u"), draws.integers("i", 1_000), draws.integers("v", 7, (2,))]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_rank_draws_its_rows_of_what_one_process_draws(world_size: int) -> None:
    whole = every_kind(Draws(7, 11, np.arange(8)))
    parts = [every_kind(Draws(7, 11, slots)) for slots in np.array_split(np.arange(8), world_size)]
    for index, drawn in enumerate(whole):
        assert torch.equal(torch.cat([part[index] for part in parts]), drawn)


def test_a_row_is_what_numpy_gives_for_its_key_and_counter() -> None:
    key = np.frombuffer(hashlib.blake2b(b"7:noise", digest_size=16).digest(), dtype=np.uint64)
    philox = np.random.Philox(key=key, counter=[0, 0, 5, 11])
    expected = np.random.Generator(philox).standard_normal(100, dtype=np.float32)
    drawn = Draws(7, 11, np.array([4, 5])).normal("noise", (10, 10))
    np.testing.assert_array_equal(drawn[1].numpy().ravel(), expected)


def test_seed_step_slot_and_name_each_change_the_numbers() -> None:
    reference = Draws(1, 2, np.array([3])).normal("a", (4,))
    others = [
        Draws(9, 2, np.array([3])).normal("a", (4,)),
        Draws(1, 9, np.array([3])).normal("a", (4,)),
        Draws(1, 2, np.array([9])).normal("a", (4,)),
        Draws(1, 2, np.array([3])).normal("b", (4,)),
    ]
    assert not any(torch.equal(reference, other) for other in others)
    assert torch.equal(reference, Draws(1, 2, np.array([3])).normal("a", (4,)))


def test_numbers_follow_their_distributions() -> None:
    draws = Draws(0, 0, np.arange(64))
    normal, uniform, integers = (
        draws.normal("n", (4_000,)),
        draws.uniform("u", (4_000,)),
        draws.integers("i", 10, (400,)),
    )
    assert abs(float(normal.mean())) < 0.01
    assert abs(float(normal.var()) - 1) < 0.02
    assert abs(float(uniform.mean()) - 0.5) < 0.005
    assert float(uniform.min()) >= 0
    assert float(uniform.max()) < 1
    assert torch.bincount(integers.ravel(), minlength=10).min() > 0.9 * integers.numel() / 10
    # Rows are independent: neighbours in slot and in step do not correlate.
    later = Draws(0, 1, np.arange(64)).normal("n", (4_000,))
    assert abs(float((normal * later).mean())) < 0.01
    assert abs(float((normal[1:] * normal[:-1]).mean())) < 0.01
