"""Bodies that were sent compressed, unfolded piece by piece and never further than there is room."""

import zlib

_PIECE_BYTES = 1 << 20


class UnknownEncoding(Exception):
    """A Content-Encoding that we cannot undo, or bytes that are not what it says."""


class TooLarge(Exception):
    """There is more than there is room for."""


class Inflater:
    """gzip (of any number of members) and deflate (with zlib's header, as the standard says, or without)."""

    def __init__(self, encoding: str, room: int) -> None:
        if encoding not in ("gzip", "x-gzip", "deflate"):
            raise UnknownEncoding(encoding)
        self._gzip = encoding != "deflate"
        self._stream: zlib._Decompress | None = None
        self._room = room
        self._pending = b""

    @property
    def complete(self) -> bool:
        """Whether the stream has come to its own end."""
        return self._stream is not None and self._stream.eof

    def unfold(self, data: bytes) -> bytes:
        """At most `room` bytes over all calls; one more raises `TooLarge`, so that a bomb is never unfolded.

        Other threads run meanwhile.
        """
        unfolded: list[bytes] = []
        data = self._pending + data
        self._pending = b""
        while data:
            if self._stream is None or self._stream.eof:
                if len(data) < 2:
                    self._pending = data
                    break
                if self._stream is not None and not (self._gzip and data.startswith(b"\x1f\x8b")):
                    break  # padding behind the end
                self._stream = self._begin(data)
            try:
                part = self._stream.decompress(data, min(self._room + 1, _PIECE_BYTES))
            except zlib.error as error:
                raise UnknownEncoding(str(error)) from None
            self._room -= len(part)
            if self._room < 0:
                raise TooLarge
            unfolded.append(part)
            data = self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail
        return b"".join(unfolded)

    def _begin(self, data: bytes) -> "zlib._Decompress":
        if self._gzip:
            return zlib.decompressobj(zlib.MAX_WBITS | 16)
        has_header = data[0] & 0x0F == 8 and (data[0] << 8 | data[1]) % 31 == 0
        return zlib.decompressobj(zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS)
