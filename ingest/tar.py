"""A ustar writer whose bytes depend on names and data only, and which tells where each member's data lies.

Modification time, owner and group are zero; `webdataset.TarWriter` stamps the current time, and `tarfile` does not
give the offset of what it has just written.
"""

from types import TracebackType
from typing import BinaryIO, Self

BLOCK_BYTES = 512
_MAX_NAME_BYTES = 100
_MAX_MEMBER_BYTES = 8**11 - 1


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

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._position += len(data)

    def add(self, name: str, data: bytes) -> int:
        """Append a member; the offset of its first data byte."""
        self._write(_header(name, len(data)))
        offset = self._position
        self._write(data)
        self._write(bytes(-len(data) % BLOCK_BYTES))
        return offset


def _header(name: str, size: int) -> bytes:
    encoded = name.encode()
    if len(encoded) > _MAX_NAME_BYTES or size > _MAX_MEMBER_BYTES:
        raise ValueError(f"{name!r} with {size} bytes does not fit a ustar member (100 bytes of name, 8 GiB)")
    header = bytearray(BLOCK_BYTES)
    header[0 : len(encoded)] = encoded
    header[100:108] = b"0000644\0"
    header[108:116] = header[116:124] = b"0000000\0"
    header[124:136] = b"%011o\0" % size
    header[136:148] = b"00000000000\0"
    header[148:156] = b" " * 8
    header[156:157] = b"0"
    header[257:265] = b"ustar\x0000"
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)
