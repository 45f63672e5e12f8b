"""A text table cut into blocks of whole records, in bounded memory whatever the file holds.

A record ends at a line's end that no quotation mark encloses. One that does not end within `MAX_RECORD_BYTES` (a line
of half a gigabyte, a quotation mark that is never closed) is lost: the line it began with is replaced by a line that
no reader accepts, and so costs that row only.
"""

import functools
import re
from collections.abc import Callable, Iterator

BLOCK_BYTES = 4 << 20
MAX_RECORD_BYTES = 16 << 20

Read = Callable[[int], bytes]


def blocks(read: Read, lost: bytes, delimiter: bytes | None = None) -> Iterator[bytes]:
    """Blocks of whole records, `lost` for each bad line. `delimiter`: quotation marks enclose values between those."""
    data = read(BLOCK_BYTES)
    ended = not data
    while data:
        end, opened = _complete(data, delimiter)
        if end:
            yield data[:end]
            data = data[end:]
        elif len(data) > MAX_RECORD_BYTES or (ended and opened is not None and b"\n" in data[opened:]):
            yield lost
            data = _after_line(read, data, opened or 0)
        elif ended:
            yield data
            return
        if not ended and len(data) <= MAX_RECORD_BYTES:
            chunk = read(BLOCK_BYTES)
            ended = not chunk
            data += chunk


def _after_line(read: Read, data: bytes, start: int) -> bytes:
    """What follows the first line that ends after `start`."""
    while (cut := data.find(b"\n", start)) < 0:
        data, start = read(BLOCK_BYTES), 0
        if not data:
            return b""
    return data[cut + 1 :]


def _complete(data: bytes, delimiter: bytes | None) -> tuple[int, int | None]:
    """Where the last whole record ends, and where a quotation mark opens that `data` does not close."""
    if delimiter is None or b'"' not in data:
        return data.rfind(b"\n") + 1, None
    end = outside = 0
    for value in _quoted_values(delimiter).finditer(data):
        end = max(end, data.rfind(b"\n", outside, value.start()) + 1)
        outside = value.end()
        if not value[1]:
            return end, value.start()
    return max(end, data.rfind(b"\n", outside) + 1), None


@functools.cache
def _quoted_values(delimiter: bytes) -> re.Pattern[bytes]:
    """A mark encloses where it stands first in its value; elsewhere it is a letter, as in `a 5" pipe`."""
    return re.compile(rb"(?:\A|(?<=[\n" + re.escape(delimiter) + rb']))"(?:[^"]++|"")*+("?)')
