"""Tars that anyone may have written: by the standard library, which says where members lie, or forged."""

import io
import random
import tarfile
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.tar_members import Member, members

BLOCK = 512


def read(data: bytes) -> list[Member | None]:
    return list(members(io.BytesIO(data), len(data)))


def written(entries: list[tuple[tarfile.TarInfo, bytes]], layout: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=layout) as tar:
        for info, data in entries:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    return made


def forged(name: bytes, size: bytes, kind: bytes = b"0", data: bytes = b"") -> bytes:
    """A header with a right checksum and whatever fields; size as its 12 bytes."""
    block = bytearray(BLOCK)
    block[: len(name)] = name
    block[124:136] = size.ljust(12, b"\0")
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data + bytes(-len(data) % BLOCK)


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=300).filter(
    lambda name: name.strip("/") and not name.endswith("/")
)


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@given(entries=st.lists(st.tuples(names, st.binary(max_size=1200)), max_size=5))
def test_members_lie_where_the_standard_library_finds_them(layout: int, entries: list[tuple[str, bytes]]):
    try:
        data = written([(info(name), content) for name, content in entries], layout)
    except ValueError:  # ustar holds no such name
        return
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(one.offset_data, one.size) for one in tar]
    found = read(data)
    assert [(one.offset, one.length) for one in found if one] == expected
    assert all(one is not None and one.plain for one in found)
    if layout != tarfile.USTAR_FORMAT:
        assert [one.name.decode() for one in found if one] == [name for name, _ in entries]


SPECIAL = [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE]


@pytest.mark.parametrize("kind", SPECIAL)
def test_links_and_devices_are_no_plain_files_and_the_next_member_is_found(kind: bytes):
    data = written([(info("a.jpg", kind, "/etc/passwd"), b""), (info("b.jpg"), b"picture")])
    first, second = read(data)
    assert first is not None and not first.plain
    assert second is not None and second.plain and data[second.offset :][: second.length] == b"picture"


def gnu_sparse() -> bytes:
    """Two blocks of map after the header, then the data: none of it is what the file would hold."""
    header = bytearray(forged(b"s.jpg", b"%011o" % 700, b"S"))
    header[482] = 1
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:BLOCK])
    more, last = bytearray(BLOCK), bytes(BLOCK)
    more[504] = 1
    return bytes(header) + bytes(more) + last + b"x" * 700 + bytes(-700 % BLOCK)


def pax_record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(b"%d" % length) + len(key) + len(value) + 3 != length:
        length += 1
    return b"%d %s=%s\n" % (length, key, value)


def pax(key: bytes, value: bytes) -> bytes:
    record = pax_record(key, value)
    return forged(b"PaxHeader", b"%011o" % len(record), b"x", record)


def test_sparse_files_are_no_plain_files():
    after = forged(b"b.jpg", b"%011o" % 3, data=b"abc")
    for sparse in (gnu_sparse(), pax(b"GNU.sparse.major", b"1") + forged(b"s.jpg", b"%011o" % 3, data=b"abc")):
        first, second = read(sparse + after)
        assert first is not None and (first.name, first.plain) == (b"s.jpg", False)
        assert second is not None and (second.name, second.plain) == (b"b.jpg", True)


LIES: dict[str, Callable[[], bytes]] = {
    "beyond the file": lambda: forged(b"a.jpg", b"%011o" % (1 << 32)),
    "larger than any disk": lambda: forged(b"a.jpg", b"\x80" + b"\xff" * 11),
    "pax size": lambda: pax(b"size", b"9" * 18) + forged(b"a.jpg", b"%011o" % 3, data=b"abc"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_size_that_lies_ends_the_file_and_nothing_else(lie: str):
    data = forged(b"0.jpg", b"%011o" % 3, data=b"abc") + LIES[lie]()
    first, second = read(data)
    assert first == Member(b"0.jpg", BLOCK, 3, True)
    assert second is not None and second.offset + second.length > len(data)


@pytest.mark.parametrize("size", [b"\xff" * 12, b"-0000000001", b"0x100", b"1_000", "١٢".encode()])
def test_a_size_that_is_none_is_told_once_and_the_next_member_is_found(size: bytes):
    data = forged(b"a.jpg", size, data=b"x" * 1300) + forged(b"b.jpg", b"%011o" % 3, data=b"abc")
    assert read(data) == [None, Member(b"b.jpg", len(data) - BLOCK, 3, True)]


def test_pax_headers_may_be_nonsense():
    after = forged(b"a.jpg", b"%011o" % 3, data=b"abc")
    for record in (
        b"",
        b"\xff" * 50,
        b"0 path=x\n",
        b"99999999 path=x\n",
        b"-5 path=x\n",
        b"9 size=x\n",
        b"11 size=-1\n",
    ):
        member = read(forged(b"h", b"%011o" % len(record), b"x", record) + after)[-1]
        assert member is not None and (member.name, member.length) == (b"a.jpg", 3)
    huge = forged(b"h", b"%011o" % (5 << 20), b"x", b"\0" * (5 << 20)) + after
    assert [member.name for member in read(huge) if member] == [b"a.jpg"]


@pytest.mark.parametrize("cut", [1, 511, 512, 513, 700])
def test_a_file_that_ends_early_keeps_what_came_before(cut: int):
    first = forged(b"a.jpg", b"%011o" % 3, data=b"abc")
    found = read(first + forged(b"b.jpg", b"%011o" % 600, data=b"x" * 600)[:cut])
    assert found[0] == Member(b"a.jpg", BLOCK, 3, True)
    assert len(found) == 2 and (found[1] is None) == (cut < BLOCK)


@given(st.integers(0, 2**32))
def test_any_damage_ends_and_yields_members_in_order(seed: int):
    draws = random.Random(seed)
    data = bytearray(written([(info(f"{n}.jpg"), draws.randbytes(draws.randrange(900))) for n in range(6)]))
    for _ in range(draws.randrange(1, 40)):
        data[draws.randrange(len(data))] = draws.randrange(256)
    found = [member for member in read(bytes(data)) if member is not None]
    assert [member.offset for member in found] == sorted(member.offset for member in found)
    assert all(member.length >= 0 for member in found)


def test_garbage_is_one_stretch():
    assert read(random.Random(0).randbytes(100_000)) == [None]
    assert read(b"") == []
