import csv
import io
import itertools
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest import lines
from ingest.lines import blocks

LOST = b",,,,\n"

pieces = st.sampled_from([b'"', b'""', b",", b"\n", b"a", b"bc", b'5" x', b',"', b'",'])


def csv_rows(data: bytes) -> list[list[str]]:
    return list(csv.reader(io.StringIO(data.decode(), newline="")))


@given(st.lists(pieces, max_size=40).map(b"".join), st.integers(1, 9))
def test_blocks_are_whole_records_as_another_csv_reader_sees_them(data: bytes, block_bytes: int):
    if data.count(b'"') % 2:
        data += b'"'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK_BYTES", block_bytes)
        found = list(blocks(io.BytesIO(data).read, LOST, b","))
    if LOST not in found:  # the last mark opens a value that nothing closes
        assert b"".join(found) == data
    if LOST not in found and all(not line or line.count(b'"') % 2 == 0 for line in found):
        assert list(itertools.chain.from_iterable(csv_rows(block) for block in found)) == csv_rows(data)


@given(st.binary(max_size=60), st.integers(1, 9))
def test_without_quotation_marks_a_block_ends_at_a_line(data: bytes, block_bytes: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK_BYTES", block_bytes)
        found = list(blocks(io.BytesIO(data).read, LOST))
    assert b"".join(found) == data
    assert all(block.endswith(b"\n") for block in found[:-1])


def test_a_mark_that_is_never_closed_costs_its_line_only():
    data = b'a,"open\n' + b"b,c\n" * 3 + b'd,"good"\n'
    assert b"".join(blocks(io.BytesIO(data[:-9]).read, LOST, b",")) == LOST + b"b,c\n" * 3
    # Where a later mark closes it, all between them is one value: that is what the format says.
    assert b"".join(blocks(io.BytesIO(data).read, LOST, b",")) == data


def test_a_mark_inside_a_value_is_a_letter():
    data = b'a,5" pipe\nb,c\nd,e\n'
    assert b"".join(blocks(io.BytesIO(data).read, LOST, b",")) == data


@pytest.mark.parametrize("start", [b"", b'"'], ids=["a line", "a quotation mark"])
def test_half_a_gigabyte_without_an_end_is_one_lost_line_in_bounded_memory(start: bytes):
    before, after = b"a,b\n", b"c,d\n"
    chunk, count = b"x" * lines.BLOCK_BYTES, 125
    script = iter([before + start, *itertools.repeat(chunk, count), b"\n" + after])
    tracemalloc.start()
    try:
        found = b"".join(blocks(lambda _: next(script, b""), LOST, b","))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == before + LOST + after
    assert peak < 4 * (lines.MAX_RECORD_BYTES + lines.BLOCK_BYTES)


def test_an_unclosed_mark_in_a_long_file_costs_its_line_only():
    row = b"http://a/b,caption\n"
    many = row * (2 * lines.MAX_RECORD_BYTES // len(row))
    found = b"".join(blocks(io.BytesIO(row + b'x,"open\n' + many).read, LOST, b","))
    assert found == row + LOST + many
