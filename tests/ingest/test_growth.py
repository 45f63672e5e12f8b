import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.artifact import Artifact, Request
from cluster.storage import Folder
from cluster.workshop import Workshop, begin
from ingest import arrangement, external_sort, growth
from ingest.growth import Growth, grow_pairs
from ingest.partition import build_pairs, pair_id
from tests.ingest.test_partition import Rows, Value

Pairs = list[tuple[Value, Value]]


def begun(folder: Path, snapshot: int) -> Workshop:
    return begin(Folder(folder), Request("pairs", 1, {"snapshot": snapshot}, {}), {})


def first(folder: Path, rows: Pairs, shard_rows: int, removed: pa.Array | None = None) -> Artifact:
    shop = begun(folder, 1)
    source = Rows(rows)
    totals = build_pairs(source, shop, shard_rows=shard_rows, removed=removed)  # type: ignore[arg-type]
    return shop.publish(totals["shards"])


def grown(
    base: Artifact, folder: Path, rows: Pairs, shard_rows: int, *, snapshot: int = 2, prune: bool = False
) -> tuple[Growth, Artifact, Workshop]:
    shop = begun(folder, snapshot)
    result = grow_pairs(base, Rows(rows), shop, shard_rows=shard_rows, prune=prune)  # type: ignore[arg-type]
    return result, shop.publish(result.shards, inherit=result.inherited), shop


def table_of(artifact: Artifact) -> list[dict[str, object]]:
    shards = [pq.read_table(artifact.file(f"{entry.shard:08d}.parquet")) for entry in artifact.shards]
    return pa.concat_tables(shards).to_pylist()


def ids_of(rows: list[dict[str, object]], *marks: str | None) -> list[bytes]:
    return [row["pair_id"] for row in rows if row["mark"] in marks]  # type: ignore[misc]


few = st.tuples(st.none() | st.sampled_from([b"a", b"b", b"c"]), st.none() | st.sampled_from([b"x", b"y", b"z"]))
tables = st.lists(few, min_size=1, max_size=30)


@settings(max_examples=50)
@given(tables, tables, st.integers(1, 9), st.booleans(), st.booleans())
def test_two_snapshots_together_hold_every_pair_once(
    old: Pairs, new: Pairs, shard_rows: int, prune: bool, tiny_memory: bool
):
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        if tiny_memory:
            patch.setattr(external_sort.SortedRuns.__init__, "__kwdefaults__", {"run_bytes": 100})
            patch.setattr(external_sort, "BATCH_BYTES", 50)
            patch.setattr(arrangement, "_IDS_AT_ONCE", 4)
            patch.setattr(growth, "_IDS_AT_ONCE", 4)
        folder = Path(place) / "pairs"
        base = first(folder, old, shard_rows)
        before = table_of(base)
        result, artifact, shop = grown(base, folder, new, shard_rows, prune=prune)
        after = table_of(artifact)
        listed = pq.read_table(shop.work.local_path("vanished.parquet")).to_pylist()
    old_ids, new_ids = ([pair_id(*pair) for pair in rows] for rows in (old, new))
    vanished = [identity for identity in old_ids if identity not in new_ids]
    assert sorted(row["pair_id"] for row in listed) == sorted(vanished)
    assert result.vanished_rows == len(vanished)
    assert result.snapshot_rows == len(new)
    # The old rows are where they were.
    assert [row["pair_id"] for row in after[: len(old)]] == [row["pair_id"] for row in before]
    assert {row["pair_id"] for row in after[: len(old)] if row["mark"] == "removed"} == (
        set(vanished) if prune else set()
    )
    if not prune:
        assert after[: len(old)] == before
    # The others are the new pairs, every row of them, and each pair stands once.
    added = [pair_id(*pair) for pair in new if pair_id(*pair) not in old_ids]
    assert sorted(row["pair_id"] for row in after[len(old) :]) == sorted(added)
    assert result.new_rows == len(added)
    live = ids_of(after, None)
    assert len(live) == len(set(live)) and set(live) == (set(new_ids) if prune else set(old_ids) | set(new_ids))


def test_old_shards_are_inherited_and_the_last_is_not_filled_up(tmp_path: Path):
    old: Pairs = [(b"u%d" % n, b"c") for n in range(7)]
    base = first(tmp_path / "pairs", old, 5)
    result, artifact, shop = grown(base, tmp_path / "pairs", [*old, (b"v", b"1"), (b"w", b"1"), (b"v", b"2")], 5)
    assert result.new_shards == (2,) and result.changed_shards == () and set(result.inherited) == {0, 1}
    assert [entry.rows for entry in artifact.shards] == [5, 2, 3]
    assert [entry.files for entry in artifact.shards[:2]] == [entry.files for entry in base.shards]
    assert shop.committed() == {2}
    assert [(row["url"], row["source_row"]) for row in table_of(artifact)[7:]] == [("v", 7), ("v", 9), ("w", 8)]


def test_a_snapshot_without_news_adds_nothing(tmp_path: Path):
    old: Pairs = [(b"u", b"c"), (b"u", b"c"), (None, b"x"), (b"v", None)]
    base = first(tmp_path / "pairs", old, 3)
    result, artifact, _ = grown(base, tmp_path / "pairs", list(reversed(old)), 3)
    assert (result.new_rows, result.vanished_rows, result.shards) == (0, 0, 2)
    assert artifact.content_digest == base.content_digest
    assert result.summary() == "0 new pairs in 0 shards; 0 vanished from the source"


def test_a_pair_that_was_taken_down_stays_away(tmp_path: Path):
    gone = pa.array([pair_id(b"u", b"c")], pa.binary(16))
    old: Pairs = [(b"u", b"c"), (b"v", b"d")]
    base = first(tmp_path / "pairs", old, 5, removed=gone)
    shop = begun(tmp_path / "pairs", 2)
    source = Rows([*old, (b"w", b"e")])
    result = grow_pairs(base, source, shop, shard_rows=5, removed=gone, prune=True)  # type: ignore[arg-type]
    rows = table_of(shop.publish(result.shards, inherit=result.inherited))
    assert [(row["url"], row["mark"]) for row in rows] == [(None, "removed"), ("v", None), ("w", None)]
    assert result.vanished_rows == 0, "a removed row cannot vanish"


def test_a_pair_that_was_pruned_may_return(tmp_path: Path):
    base = first(tmp_path / "pairs", [(b"u", b"c"), (b"v", b"d")], 5)
    _, without, _ = grown(base, tmp_path / "pairs", [(b"v", b"d")], 5, prune=True)
    assert [(row["url"], row["mark"]) for row in table_of(without)] == [(None, "removed"), ("v", None)]
    _, again, _ = grown(without, tmp_path / "pairs", [(b"u", b"c"), (b"v", b"d")], 5, snapshot=3)
    assert [(row["url"], row["mark"]) for row in table_of(again)] == [(None, "removed"), ("v", None), ("u", None)]


def test_growth_that_was_cut_off_goes_on_to_the_same_bytes(tmp_path: Path):
    old: Pairs = [(b"u%d" % n, b"c") for n in range(20)]
    new: Pairs = [(b"u%d" % n, b"c") for n in range(10, 40)]

    class CutOff(Exception):
        pass

    def after(shards: int) -> Callable[[dict[str, int]], None]:
        def stop(done: dict[str, int]) -> None:
            if done["shards"] == shards:
                raise CutOff

        return stop

    digests = set()
    for place, cuts in (("whole", ()), ("cut", (1, 3))):
        base = first(tmp_path / place, old, 6)
        for shards in cuts:
            shop = begun(tmp_path / place, 2)
            with pytest.raises(CutOff):
                grow_pairs(base, Rows(new), shop, shard_rows=6, prune=True, report=after(shards))  # type: ignore[arg-type]
        result, artifact, _ = grown(base, tmp_path / place, new, 6, prune=True)
        assert (result.new_rows, result.vanished_rows, result.pruned_rows) == (20, 10, 10)
        digests.add(artifact.content_digest)
    assert len(digests) == 1
