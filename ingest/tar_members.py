"""The members of a tar that anyone may have written: where their data lies, and nothing else.

Nothing is extracted and no name becomes a path. ustar, GNU and pax headers are read; what is no plain file (a link, a
device, a sparse file) is told as such. Bytes that are no header are skipped up to the next header and told once, as a
`None`. Sizes may lie: a member may end beyond the file, and a negative size is no header.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from ingest.tar import BLOCK_BYTES

_MAX_NAME_BYTES = 64 << 10
_MAX_PAX_BYTES = 1 << 20
_ZEROS = bytes(BLOCK_BYTES)
_OCTAL = re.compile(rb"^ *([0-7]*)[ \0]*$")
_PLAIN = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")


@dataclass(frozen=True)
class Member:
    """`plain`: its `length` bytes from `offset` on are a file's content."""

    name: bytes
    offset: int
    length: int
    plain: bool


@dataclass(frozen=True)
class Header:
    name: bytes
    kind: bytes
    size: int
    extended: bool  # GNU sparse: more blocks of its map follow


def members(file: IO[bytes], file_bytes: int) -> Iterator[Member | None]:
    """The members of an open tar in order; `None` for each stretch that is no tar."""
    position = zeros = 0
    lost = False
    name: bytes | None = None
    pax: dict[bytes, bytes] = {}
    while position < file_bytes:
        block = _read(file, position, BLOCK_BYTES)
        position += BLOCK_BYTES
        if block == _ZEROS:
            zeros += 1
            if zeros == 2:
                return
            continue
        zeros = 0
        header = parse_header(block)
        if header is None:
            if not lost:
                yield None
            lost, name, pax = True, None, {}
            continue
        lost = False
        size = _pax_size(pax, header.size)
        end = position + (0 if header.kind in _WITHOUT_DATA else size + -size % BLOCK_BYTES)
        if header.kind == b"L" and size <= _MAX_NAME_BYTES:
            name = _read(file, position, size).rstrip(b"\0")
        elif header.kind == b"x" and size <= _MAX_PAX_BYTES:
            pax = _pax_fields(_read(file, position, size))
        elif header.kind not in (b"L", b"K", b"x", b"g"):
            if header.kind == b"S":
                end += _sparse_map_bytes(file, position, header.extended)
            plain = header.kind in _PLAIN and not any(key.startswith(b"GNU.sparse") for key in pax)
            yield Member(pax.get(b"path", name or header.name), position, size, plain)
            name, pax = None, {}
        position = end


def parse_header(block: bytes) -> Header | None:
    """The fields of a header block, None where its checksum is wrong or its size is none."""
    if len(block) < BLOCK_BYTES:
        return None
    checksum, size = _number(block[148:156]), _number(block[124:136])
    if size is None or checksum != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        return None
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return Header(prefix + b"/" + name if prefix else name, block[156:157], size, block[482:483] not in (b"\0", b""))


def _number(field: bytes) -> int | None:
    """Octal digits, or a positive number in base 256."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = _OCTAL.match(field)
    return int(digits[1] or b"0", 8) if digits else None


def _pax_size(pax: dict[bytes, bytes], size: int) -> int:
    given = pax.get(b"size", b"")
    return int(given) if 0 < len(given) <= 20 and given.isdigit() else size


def _pax_fields(data: bytes) -> dict[bytes, bytes]:
    """`27 path=a longer name.jpg\\n` …; what does not look so ends it."""
    fields: dict[bytes, bytes] = {}
    while match := re.match(rb"(\d{1,8}) ([^=\n]+)=", data):
        length = int(match[1])
        if length <= match.end() or length > len(data):
            break
        fields[match[2]] = data[match.end() : length - 1]
        data = data[length:]
    return fields


def _sparse_map_bytes(file: IO[bytes], position: int, extended: bool) -> int:
    start = position
    while extended:
        block = _read(file, position, BLOCK_BYTES)
        position += BLOCK_BYTES
        extended = len(block) == BLOCK_BYTES and block[504] != 0
    return position - start


def _read(file: IO[bytes], position: int, count: int) -> bytes:
    file.seek(position)
    return file.read(count)
