from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from cluster.artifact import Artifact
from cluster.workshop import Workshop
from ingest.ledger import PAIRS_SCHEMA
from ingest.partition import build_pairs, pair_id
from ingest.sources import SourceBatch, open_source

Value = bytes | None
values = st.none() | st.binary(max_size=12)


@given(values, values, values, values)
def test_two_pairs_have_one_id_only_if_they_are_equal(a: Value, b: Value, c: Value, d: Value):
    assert (pair_id(a, b) == pair_id(c, d)) == ((a, b) == (c, d))
    assert len(pair_id(a, b)) == 16


class Rows:
    """A source in memory, in batches of seven."""

    def __init__(self, rows: list[tuple[Value, Value]]) -> None:
        self.rows = rows

    def batches(self) -> Iterator[SourceBatch]:
        for first in range(0, len(self.rows), 7):
            part = self.rows[first : first + 7]
            yield SourceBatch("rows", first, [u for u, _ in part], [c for _, c in part])


def built(
    rows: list[tuple[Value, Value]], workshop: Workshop, shard_rows: int
) -> tuple[list[pa.Table], dict[str, int]]:
    totals = build_pairs(Rows(rows), workshop, shard_rows=shard_rows)  # type: ignore[arg-type]
    artifact = workshop.publish(totals["shards"])
    return [pq.read_table(artifact.file(f"{shard:08d}.parquet")) for shard in range(artifact.shard_count)], totals


def test_rows_are_dealt_in_order_into_equal_shards(workshop: Callable[[str], Workshop]):
    rows: list[tuple[Value, Value]] = [(b"u%d" % n, b"c") for n in range(25)]
    shards, totals = built(rows, workshop("pairs"), 10)
    assert [shard.num_rows for shard in shards] == [10, 10, 5]
    assert totals == {"rows": 25, "shards": 3, "duplicates": 0}
    assert [url for shard in shards for url in shard["url"].to_pylist()] == [f"u{n}" for n in range(25)]
    assert [row for shard in shards for row in shard["source_row"].to_pylist()] == list(range(25))
    assert all(shard.schema.equals(PAIRS_SCHEMA) for shard in shards)


def test_of_exact_duplicates_the_first_stays(workshop: Callable[[str], Workshop]):
    rows: list[tuple[Value, Value]] = [
        (b"u", b"c"),
        (b"u", b"d"),
        (b"u", b"c"),
        (b"u", None),
        (b"u", b""),
        (b"u", b"c"),
    ]
    shards, totals = built(rows, workshop("pairs"), 4)
    marked = [mark == "duplicate" for shard in shards for mark in shard["mark"].to_pylist()]
    assert marked == [False, False, True, False, False, True]
    assert totals["duplicates"] == 2


def test_text_that_is_not_utf8_stays_bytes_and_costs_one_value(workshop: Callable[[str], Workshop]):
    rows: list[tuple[Value, Value]] = [(b"u\xff", b"good"), (b"good", b"\xc3\x28"), (None, b"c"), (b"u", None)]
    table = built(rows, workshop("pairs"), 10)[0][0]
    assert table["url"].to_pylist() == [None, "good", None, "u"]
    assert table["url_bytes"].to_pylist() == [b"u\xff", None, None, None]
    assert table["caption"].to_pylist() == ["good", None, "c", None]
    assert table["caption_bytes"].to_pylist() == [None, b"\xc3\x28", None, None]


def test_a_rebuild_after_an_interruption_gives_equal_bytes(workshop: Callable[[str], Workshop]):
    rows: list[tuple[Value, Value]] = [(b"u%d" % (n % 20), b"c") for n in range(30)]
    whole = workshop("whole")
    built(rows, whole, 8)
    half = workshop("half")

    class Interrupted(Exception):
        pass

    def stop(state: dict[str, int]) -> None:
        if state["shards"] == 2:
            raise Interrupted

    try:
        build_pairs(Rows(rows), half, shard_rows=8, report=stop)  # type: ignore[arg-type]
    except Interrupted:
        assert half.committed() == {0, 1}
    built(rows, half, 8)
    digests = {Artifact.open(workshop.folder).content_digest for workshop in (whole, half)}
    assert len(digests) == 1


def test_pairs_of_a_real_table_carry_its_name(tmp_path: Path, workshop: Callable[[str], Workshop]):
    (tmp_path / "t.csv").write_text("url,caption\nhttp://a/b,hello\n")
    totals = build_pairs(open_source(f"{tmp_path}/t.csv"), workshop("pairs"), shard_rows=5)
    row = pq.read_table(workshop("pairs").publish(totals["shards"]).file("00000000.parquet")).to_pylist()[0]
    assert row["source_file"] == "t.csv" and row["pair_id"] == pair_id(b"http://a/b", b"hello")
