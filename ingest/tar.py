"""A ustar writer whose bytes depend on names and data only, and which tells where each member's data lies.

Modification time, owner and group are zero; `webdataset.TarWriter` stamps the current time, and `tarfile` does not
give the offset of what it has just written.
"""

from types import TracebackType
from typing import BinaryIO, Self

BLOCK_BYTES = 512
_MAX_NAME_BYTES = 100
_MAX_MEMBER_BYTES = 8**11 - 1

# A header's fields in their order: name, then mode, owner and group; size; time of modification; checksum; the rest.
_OWNED = b"0000644\0" + 2 * b"0000000\0"
_DATED = b"\0" + b"00000000000\0"
_KIND = (b"0" + bytes(100) + b"ustar\x0000").ljust(356, b"\0")
_REST_SUM = sum(_OWNED + _DATED + 8 * b" " + _KIND)  # a checksum is that of its own field as spaces


class DeterministicTar:
    """Context manager around an open binary file; closes the archive, not the file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._position = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._write(bytes(2 * BLOCK_BYTES))

    def _write(self, *pieces: bytes) -> None:
        self._file.writelines(pieces)
        self._position += sum(map(len, pieces))

    def add(self, name: str, data: bytes) -> int:
        """Append a member; the offset of its first data byte."""
        offset = self._position + BLOCK_BYTES
        self._write(_header(name, len(data)), data, bytes(-len(data) % BLOCK_BYTES))
        return offset


def _header(name: str, size: int) -> bytes:
    encoded = name.encode()
    if len(encoded) > _MAX_NAME_BYTES or size > _MAX_MEMBER_BYTES:
        raise ValueError(f"{name!r} with {size} bytes does not fit a ustar member (100 bytes of name, 8 GiB)")
    digits = b"%011o" % size
    checksum = b"%06o\0 " % (_REST_SUM + sum(encoded) + sum(digits))
    return b"".join((encoded.ljust(_MAX_NAME_BYTES, b"\0"), _OWNED, digits, _DATED, checksum, _KIND))
