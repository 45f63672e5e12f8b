from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest import external_sort
from ingest.external_sort import Ahead, SortedRuns, sorted_order

small = st.lists(st.tuples(st.integers(0, 3), st.integers(-3, 3)), min_size=1, max_size=80)


def table_of(rows: list[tuple[int, int]], start: int) -> pa.Table:
    first, second = zip(*rows, strict=True)
    place = np.arange(start, start + len(rows))
    names = pa.array([f"row {n} " + "x" * (n % 5 * 40) for n in place])
    high = np.array(first, np.uint64) + np.uint64(2**63)
    return pa.table({"high": high, "low": np.array(second), "place": place, "name": names})


@given(small, st.integers(1, 20), st.sampled_from([1, 300, 1 << 20]), st.integers(2, 5))
def test_rows_come_sorted_and_whole_however_little_fits(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int]], at_once: int, run_bytes: int, fan_in: int
):
    folder = tmp_path_factory.mktemp("sort")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(external_sort, "BATCH_BYTES", 200)
        patch.setattr(external_sort, "FAN_IN", fan_in)
        runs = SortedRuns(folder, "t", ("high", "low", "place"), run_bytes=run_bytes)
        for start in range(0, len(rows), at_once):
            runs.add(table_of(rows[start : start + at_once], start))
        expected = sorted((2**63 + first, second, n) for n, (first, second) in enumerate(rows))
        for _ in range(2):  # as often as one likes
            found = pa.concat_tables(list(runs.sorted())).to_pylist()
            assert [(row["high"], row["low"], row["place"]) for row in found] == expected
            assert all(row["name"].startswith(f"row {row['place']} ") for row in found)
        assert runs.rows == len(rows)
    runs.clear()
    assert not list(folder.iterdir()) and not list(runs.sorted())


@given(st.lists(st.integers(0, 30), max_size=60).map(sorted), st.lists(st.integers(0, 40), max_size=8).map(sorted))
def test_pieces_stop_at_the_bound_and_go_on_from_there(keys: list[int], bounds: list[int]):
    tables = (pa.table({"key": np.array(keys[start : start + 7], np.int64)}) for start in range(0, len(keys), 7))
    ahead = Ahead(tables, "key")
    previous = -1
    for bound in bounds:
        found = ahead.below(bound)
        taken = [] if found is None else found["key"].to_pylist()
        assert taken == [key for key in keys if previous <= key < bound]
        previous = max(previous, bound)


@given(small)
def test_the_order_is_that_of_all_keys(rows: list[tuple[int, int]]):
    keys = [np.array(column) for column in zip(*rows, strict=True)] + [np.arange(len(rows))]
    assert [(*rows[n], n) for n in sorted_order(keys)] == sorted((*row, n) for n, row in enumerate(rows))


def test_a_long_sort_keeps_few_bytes_in_memory(tmp_path: Path):
    runs = SortedRuns(tmp_path, "t", ("place",), run_bytes=1 << 20)
    for start in range(0, 400_000, 20_000):
        runs.add(pa.table({"place": np.arange(400_000 - start, 380_000 - start, -1), "value": np.zeros(20_000)}))
    before = pa.total_allocated_bytes()
    peak = count = 0
    for table in runs.sorted():
        count += table.num_rows
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert count == 400_000 and peak < 10 << 20
