import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.pairs import measured
from cluster.artifact import Artifact, Request
from cluster.errors import UserError, WorkFailed
from cluster.storage import Folder
from cluster.workshop import Workshop, begin
from ingest import arrangement, external_sort
from ingest.ledger import PAIRS_SCHEMA
from ingest.partition import build_pairs, pair_id
from ingest.scratch import scratch_folder
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
    assert totals == {"rows": 25, "shards": 3, "duplicates": 0, "removed": 0}
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


def expected_order(rows: list[tuple[Value, Value]]) -> list[int]:
    """The contract in one line each: by the first position of the row's URL, then by the row's own."""
    first: dict[Value, int] = {}
    for position, (url, _) in enumerate(rows):
        first.setdefault(url, position)
    return sorted(range(len(rows)), key=lambda p: (p if rows[p][0] is None else first[rows[p][0]], p))


few = st.none() | st.sampled_from([b"a", b"b", b"c", b"\xff"])


@given(st.lists(st.tuples(few, few), min_size=1, max_size=60), st.integers(1, 20), st.booleans())
def test_any_table_is_arranged_by_url_and_marked_whatever_fits_in_memory(
    rows: list[tuple[Value, Value]], shard_rows: int, tiny_memory: bool
):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if tiny_memory:  # every few rows are a run of their own, and three runs are merged at a time
            patch.setattr(external_sort.SortedRuns.__init__, "__kwdefaults__", {"run_bytes": 100})
            patch.setattr(external_sort, "BATCH_BYTES", 50)
            patch.setattr(external_sort, "FAN_IN", 3)
            patch.setattr(arrangement, "_IDS_AT_ONCE", 4)
        shop = begin(Folder(f"{folder}/pairs"), Request("pairs", 1, {}, {}), {})
        shards, totals = built(rows, shop, shard_rows)
        assert not list(Path(shop.work.uri).iterdir()), "scratch is gone"
    table = pa.concat_tables(shards).to_pylist()
    assert [shard.num_rows for shard in shards[:-1]] == [shard_rows] * (len(shards) - 1)
    assert [row["source_row"] for row in table] == expected_order(rows)
    for row in table:
        position = row["source_row"]
        again = rows.index(rows[position]) < position
        assert row["mark"] == ("duplicate" if again else None)
        assert row["pair_id"] == pair_id(*rows[position])
    assert totals["duplicates"] == len(rows) - len(set(rows))


def test_rows_of_one_url_stand_at_the_place_of_the_first(workshop: Callable[[str], Workshop]):
    rows: list[tuple[Value, Value]] = [(b"u%d" % (n % 7), b"c%d" % n) for n in range(20)] + [(None, b"x")] * 2
    table = pa.concat_tables(built(rows, workshop("pairs"), 6)[0])
    assert table["source_row"].to_pylist() == [n for first in range(7) for n in range(first, 20, 7)] + [20, 21]


def test_bytes_depend_on_the_rows_and_not_on_what_fits_in_memory(
    workshop: Callable[[str], Workshop], monkeypatch: pytest.MonkeyPatch
):
    rows: list[tuple[Value, Value]] = [(b"u%d" % (n * 31 % 300), b"c%d" % (n % 800)) for n in range(2000)]
    digests = set()
    for name, run_bytes, batch_bytes in (("large", 1 << 20, 1 << 20), ("small", 5000, 700), ("tiny", 600, 90)):
        monkeypatch.setattr(external_sort.SortedRuns.__init__, "__kwdefaults__", {"run_bytes": run_bytes})
        monkeypatch.setattr(external_sort, "BATCH_BYTES", batch_bytes)
        built(rows, workshop(name), 150)
        digests.add(Artifact.open(workshop(name).folder).content_digest)
    assert len(digests) == 1


def test_one_url_with_very_many_rows_streams(workshop: Callable[[str], Workshop], monkeypatch: pytest.MonkeyPatch):
    """A placeholder that half a collection links to: nothing holds all of its rows at once."""
    monkeypatch.setattr(external_sort.SortedRuns.__init__, "__kwdefaults__", {"run_bytes": 20_000})
    monkeypatch.setattr(external_sort, "BATCH_BYTES", 4_000)
    rows: list[tuple[Value, Value]] = [(b"hot" if n % 2 else b"u%d" % n, b"c%d" % n) for n in range(20_000)]
    sizes: list[int] = []
    merged = arrangement._merged
    monkeypatch.setattr(
        arrangement, "_merged", lambda heads, movers: sizes.append(len(movers)) or merged(heads, movers)
    )
    table = pa.concat_tables(built(rows, workshop("pairs"), 1000)[0])
    assert table["source_row"].to_pylist() == expected_order(rows)
    assert sum(sizes) > 9_000 and max(sizes) < 1_000


def test_a_source_that_changes_while_it_is_read_is_told(workshop: Callable[[str], Workshop]):
    class Changing(Rows):
        def __init__(self, *tables: list[tuple[Value, Value]]) -> None:
            self.tables = list(tables)

        def batches(self) -> Iterator[SourceBatch]:
            self.rows = self.tables.pop(0)
            yield from super().batches()

    before: list[tuple[Value, Value]] = [(b"u%d" % n, b"c") for n in range(20)]
    for name, after in (("longer", [*before, (b"v", b"d")]), ("shorter", before[:14]), ("other", before[::-1])):
        with pytest.raises(WorkFailed, match="has changed while it was read"):
            build_pairs(Changing(before, after), workshop(name), shard_rows=5)  # type: ignore[arg-type]


def test_tombstones_leave_a_row_without_values(workshop: Callable[[str], Workshop]):
    rows: list[tuple[Value, Value]] = [(b"u", b"c"), (b"v", b"d"), (b"u", b"c"), (b"w", b"\xff"), (b"u", b"e")]
    gone = pa.array(sorted([pair_id(b"u", b"c"), pair_id(b"w", b"\xff"), pair_id(b"never", b"there")]), pa.binary(16))
    totals = build_pairs(Rows(rows), workshop("pairs"), shard_rows=10, removed=gone)  # type: ignore[arg-type]
    artifact = workshop("pairs").publish(totals["shards"])
    table = pq.read_table(artifact.file("00000000.parquet")).to_pylist()
    assert [row["source_row"] for row in table] == [0, 2, 4, 1, 3]
    assert [row["mark"] for row in table] == ["removed", "removed", None, None, "removed"]
    for row in table:
        erased = [row[name] for name in ("url", "caption", "url_bytes", "caption_bytes")] == [None] * 4
        assert erased == (row["mark"] == "removed")
    assert artifact.shards[0].counts == {"unique": 2, "duplicate": 0, "removed": 3}


def test_what_a_killed_run_left_is_deleted_by_the_next(workshop: Callable[[str], Workshop], tmp_path: Path):
    shop = workshop("pairs")
    left = Path(shop.work.uri) / "arrangement" / "by-url-00000.arrow"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half a run")
    built([(b"u", b"c")], shop, 10)
    assert not left.exists()


def test_a_workshop_elsewhere_has_its_scratch_on_this_machine_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    shop = begin(Folder(f"memory://{uuid.uuid4().hex}/pairs"), Request("pairs", 1, {}, {}), {})
    with scratch_folder(shop, "arrangement") as first:
        (first / "left").write_bytes(b"")
        os.rename(first, tmp_path / "kept")  # as a killed run leaves it
    os.rename(tmp_path / "kept", first)
    assert first.parent == tmp_path / "tmp"
    with scratch_folder(shop, "arrangement") as second:
        assert second == first and not list(second.iterdir())
    assert not list((tmp_path / "tmp").iterdir())
    first.symlink_to(tmp_path)
    with pytest.raises(UserError, match="is in the way"), scratch_folder(shop, "arrangement"):
        pass


KILLED = """
import os, signal, sys
from cluster.artifact import Request
from cluster.storage import Folder
from cluster.workshop import begin
from ingest import arrangement, external_sort
from ingest.partition import build_pairs
from ingest.sources import open_source

external_sort.SortedRuns.__init__.__kwdefaults__["run_bytes"] = 20_000
reports = 0
def report(done):
    global reports
    reports += 1
    if reports == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
shop = begin(Folder(sys.argv[2]), Request("pairs", 1, {}, {}), {})
totals = build_pairs(open_source(sys.argv[1]), shop, shard_rows=500, report=report)
print(shop.publish(totals["shards"]).content_digest)
"""


def test_a_build_that_was_killed_goes_on_to_the_same_bytes_and_leaves_no_scratch(tmp_path: Path):
    lines = [f"http://a/{n * 7 % 900},caption {n % 1700}" for n in range(3000)]
    (tmp_path / "t.csv").write_text("\n".join(["url,caption", *lines]))

    def build(place: str, killed_at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", KILLED, str(tmp_path / "t.csv"), str(tmp_path / place), str(killed_at)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    whole = build("whole", 0).stdout
    for killed_at in (1, 3, 5):
        assert build("killed", killed_at).returncode == -signal.SIGKILL
    assert list((tmp_path / "killed" / "work" / "arrangement").iterdir())
    assert build("killed", 0).stdout == whole != ""
    assert not list((tmp_path / "killed" / "work").iterdir())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a process reads its own peak from /proc")
def test_memory_does_not_grow_with_the_table(tmp_path: Path):
    """Five times the rows, in processes of their own: their peaks differ by what runs and buffers take at most."""
    few, many = (measured(rows, 10_000, tmp_path / str(rows)) for rows in (300_000, 1_500_000))
    assert many["totals"]["duplicates"] > 4 * few["totals"]["duplicates"] > 0
    assert many["peak_rss_bytes"] < 600e6
    assert many["peak_rss_bytes"] - few["peak_rss_bytes"] < 200e6


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
