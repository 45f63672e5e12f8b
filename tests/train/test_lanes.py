"""The order of the data: what DESIGN's lanes promise, for any sizes."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UserError
from train.lanes import Lanes, permute, slots_of


@st.composite
def some_lanes(draw: st.DrawFn) -> Lanes:
    rows = draw(st.integers(1, 400))
    batch_size = draw(st.integers(1, rows))
    return Lanes(
        rows=rows,
        batch_size=batch_size,
        seed=draw(st.integers(0, 2**63)),
        block_rows=draw(st.integers(1, 50)),
    )


def rows_by_epoch(lanes: Lanes, epochs: int) -> dict[int, Counter[int]]:
    """Rows of the first epochs, read step by step until lanes that run ahead are past them."""
    found: dict[int, Counter[int]] = defaultdict(Counter)
    rounds = -(-epochs * lanes.blocks // lanes.batch_size)
    for step in range(rounds * lanes.block_rows):
        place = lanes.batch(step)
        for epoch, row in zip(place.epoch.tolist(), place.row.tolist(), strict=True):
            found[epoch][row] += 1
    return found


@settings(max_examples=60, deadline=None)
@given(some_lanes())
def test_every_row_at_most_once_an_epoch_and_all_but_less_than_a_block_exactly_once(lanes: Lanes) -> None:
    found = rows_by_epoch(lanes, epochs=2)
    for epoch in (0, 1):
        assert set(found[epoch].values()) == {1}
        assert set(found[epoch]) <= set(range(lanes.rows))
        assert lanes.rows - lanes.block_rows < len(found[epoch]) <= lanes.rows


@settings(max_examples=60, deadline=None)
@given(some_lanes(), st.integers(0, 10_000))
def test_the_global_batch_is_the_same_for_every_world_size_that_divides_it(lanes: Lanes, step: int) -> None:
    whole = lanes.batch(step)
    for world_size in range(1, lanes.batch_size + 1):
        if lanes.batch_size % world_size == 0:
            parts = [lanes.at(step, slots_of(rank, world_size, lanes.batch_size)) for rank in range(world_size)]
            np.testing.assert_array_equal(np.concatenate([part.row for part in parts]), whole.row)
            np.testing.assert_array_equal(np.concatenate([part.epoch for part in parts]), whole.epoch)


@settings(max_examples=60, deadline=None)
@given(some_lanes(), st.integers(0, 100))
def test_a_lane_reads_neighbouring_rows_a_block_at_a_time(lanes: Lanes, round_: int) -> None:
    steps = range(round_ * lanes.block_rows, (round_ + 1) * lanes.block_rows)
    rows = np.sort([lanes.at(step, np.array([0])).row[0] for step in steps])
    gaps = np.diff(np.append(rows, rows[0] + lanes.rows))
    assert sorted(gaps)[:-1] == [1] * (lanes.block_rows - 1)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3_000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    keys = np.full(size, key, dtype=np.uint64)
    assert sorted(permute(np.arange(size, dtype=np.uint64), size, keys).tolist()) == list(range(size))


def test_epochs_and_seeds_differ() -> None:
    def first_rows(seed: int) -> list[int]:
        lanes = Lanes(rows=1_000, batch_size=10, seed=seed)
        return [row for step in range(20) for row in lanes.batch(step).row.tolist()]

    lanes = Lanes(rows=1_000, batch_size=10, seed=1)
    epoch_steps = lanes.blocks * lanes.block_rows // lanes.batch_size
    assert first_rows(1) != first_rows(2)
    assert lanes.batch(0).row.tolist() != lanes.batch(epoch_steps).row.tolist()


def test_rows_that_an_epoch_leaves_out_come_in_another() -> None:
    lanes = Lanes(rows=103, batch_size=4, seed=0, block_rows=10)
    found = rows_by_epoch(lanes, epochs=20)
    assert set().union(*(found[epoch] for epoch in range(20))) == set(range(103))


def test_neighbours_in_a_batch_are_spread_over_the_data() -> None:
    lanes = Lanes(rows=100_000, batch_size=256, seed=0)
    rows = np.concatenate([lanes.batch(step).row for step in range(0, 4_096, 256)])
    counts, _ = np.histogram(rows, bins=10, range=(0, lanes.rows))
    assert counts.min() > 0.7 * counts.mean()


def test_fewer_rows_than_a_batch_is_one_clear_line() -> None:
    with pytest.raises(UserError, match=r"31 training rows and batch_size is 32.*training\.batch_size"):
        Lanes(rows=31, batch_size=32, seed=0)


def test_a_batch_that_processes_cannot_share_names_what_fits() -> None:
    with pytest.raises(UserError, match=r"batch_size is 12, which 5 processes.* 4, 6"):
        slots_of(0, 5, 12)
