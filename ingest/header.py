"""What a picture's bytes say of it before anything is decoded: format, frames, orientation, weight of its metadata.

Every walk is bounded by the body and by `_STEPS`. Sizes are read here where the decoder would set aside memory for
them as soon as it is opened (JPEG, WEBP); for the other formats Pillow's own header is cheap and safe.
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ingest.decode_config import ImageFormat

_STEPS = 500_000
_ORIENTATION, _COMPRESSION, _MP_IMAGES = 274, 259, 0xB001
_TIFF_ICC, _TIFF_METADATA = 34675, frozenset({700, 33723, 34377, 37724})
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 16: 8, 17: 8, 18: 8}
# All that is needed to decode the first picture of a PNG; the rest is text, profiles and animation.
_PNG_PIXELS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_PNG_CRITICAL = frozenset({b"IHDR", b"PLTE", b"IDAT"})
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class CorruptHeader(ValueError):
    """The header contradicts itself, or ends early."""


class CorruptData(ValueError):
    """A checksum says that the pixels are not those that were written."""


@dataclass
class Header:
    """`size` is (width, height) as stored, before orientation; None where Pillow is to say."""

    format: ImageFormat
    size: tuple[int, int] | None = None
    frames: int = 1
    orientation: int = 1
    icc_bytes: int = 0
    metadata_bytes: int = 0
    components: int = 3
    compression: int = 1
    pixels_only: bytes | None = None  # the file without its metadata, where there was some


def sniffed(body: bytes) -> ImageFormat | None:
    if body.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if body.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if body.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if body.startswith(b"RIFF") and body[8:12] == b"WEBP":
        return "WEBP"
    if body.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    return "BMP" if body.startswith(b"BM") else None


def read_header(body: bytes, image_format: ImageFormat) -> Header:
    header = Header(image_format)
    try:
        if image_format in _WALKS:
            _WALKS[image_format](body, header)
    except (IndexError, OverflowError, struct.error):
        raise CorruptHeader("ends early") from None
    return header


def _jpeg(body: bytes, header: Header) -> None:
    place = 2
    for _ in range(_STEPS):
        place = body.find(b"\xff", place)
        if place < 0:
            break
        while body[place] == 0xFF:
            place += 1
        marker = body[place]
        place += 1
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:
            continue
        (length,) = struct.unpack_from(">H", body, place)
        if marker == 0xDA and header.size is not None:
            return
        if marker in (0xD9, 0xDA) or length < 2:
            break
        part = body[place + 2 : place + length]
        if marker in _START_OF_FRAME:
            height, width, header.components = struct.unpack_from(">xHHB", part)
            header.size = (width, height)
        elif marker == 0xE2 and part.startswith(b"ICC_PROFILE\0"):
            header.icc_bytes += length
        elif 0xE0 <= marker <= 0xEF or marker == 0xFE:
            header.metadata_bytes += length
            if marker == 0xE1 and part.startswith(b"Exif\0\0"):
                header.orientation = _orientation(part[6:])
            elif marker == 0xE2 and part.startswith(b"MPF\0"):
                header.frames = _tag(part[4:], _MP_IMAGES) or 1
        place += length
    raise CorruptHeader("no frame before its data")


def _png(body: bytes, header: Header) -> None:
    place, kept, dropped = 8, [body[:8]], False
    for _ in range(_STEPS):
        if place + 8 > len(body):
            break
        length, name = struct.unpack_from(">I4s", body, place)
        end = place + 12 + length
        if name in _PNG_CRITICAL and end <= len(body):
            (checksum,) = struct.unpack_from(">I", body, end - 4)
            if zlib.crc32(memoryview(body)[place + 4 : end - 4]) != checksum:
                raise CorruptData("checksum")
        if name == b"IHDR":
            header.size = struct.unpack_from(">II", body, place + 8)
        elif name == b"acTL":
            header.frames = struct.unpack_from(">I", body, place + 8)[0]
        elif name == b"eXIf":
            header.orientation = _orientation(body[place + 8 : end - 4])
        if name in _PNG_PIXELS:
            kept.append(body[place:end])
        else:
            dropped = True
            if name == b"iCCP":
                header.icc_bytes += length
            elif name not in (b"fdAT", b"fcTL"):
                header.metadata_bytes += length
        place = end
        if name == b"IEND":
            break
    if dropped:
        header.pixels_only = b"".join(kept)


def _gif(body: bytes, header: Header) -> None:
    """Frames are counted to the end, however many; a file that breaks off has as many as were there."""
    place = 13 + _colours(body[10])
    frames = 0
    try:
        for _ in range(_STEPS):
            kind = body[place]
            if kind == 0x2C:
                frames += 1
                place += 10 + _colours(body[place + 9]) + 1
            elif kind == 0x21:
                place += 2
            else:
                break
            start = place
            while body[place]:
                place += 1 + body[place]
            place += 1
            if kind == 0x21:
                header.metadata_bytes += place - start
    except IndexError:
        pass  # what is missing is told by the decoder
    header.frames = max(1, frames)


def _colours(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _webp(body: bytes, header: Header) -> None:
    place, frames = 12, 0
    for _ in range(_STEPS):
        if place + 8 > len(body):
            break
        name, length = struct.unpack_from("<4sI", body, place)
        data = place + 8
        if name == b"VP8X":
            header.size = (_three_bytes(body, data + 4) + 1, _three_bytes(body, data + 7) + 1)
        elif name == b"VP8 " and header.size is None:
            width, height = struct.unpack_from("<HH", body, data + 6)
            header.size = (width & 0x3FFF, height & 0x3FFF)
        elif name == b"VP8L" and header.size is None:
            (bits,) = struct.unpack_from("<I", body, data + 1)
            header.size = ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
        elif name == b"ANMF":
            frames += 1
        elif name == b"ICCP":
            header.icc_bytes += length
        elif name in (b"EXIF", b"XMP "):
            header.metadata_bytes += length
            if name == b"EXIF":
                header.orientation = _orientation(body[data : data + length].removeprefix(b"Exif\0\0"))
        place = data + length + (length & 1)
    if header.size is None:
        raise CorruptHeader("no picture")
    header.frames = max(1, frames)


def _three_bytes(body: bytes, place: int) -> int:
    if place + 3 > len(body):
        raise IndexError
    return int.from_bytes(body[place : place + 3], "little")


def _tiff(body: bytes, header: Header) -> None:
    """Pillow turns a TIFF upright by itself."""
    header.frames = 0
    for number, entries in enumerate(_directories(body)):
        header.frames += 1
        for tag, count, value in entries if number == 0 else ():
            if tag == _TIFF_ICC:
                header.icc_bytes += count
            elif tag in _TIFF_METADATA:
                header.metadata_bytes += count
            elif tag == _COMPRESSION:
                header.compression = value


def _orientation(block: bytes) -> int:
    value = _tag(block, _ORIENTATION)
    return value if value is not None and 1 <= value <= 8 else 1


def _tag(block: bytes, wanted: int) -> int | None:
    """A number of the first directory of a TIFF block, as EXIF is one; None where it cannot be read."""
    try:
        for entries in _directories(block):
            return next((value for tag, _, value in entries if tag == wanted), None)
    except (IndexError, OverflowError, struct.error, CorruptHeader):
        pass
    return None


def _directories(block: bytes) -> Iterator[list[tuple[int, int, int]]]:
    """(tag, bytes, value) of the entries of each directory, each directory once however they point at each other."""
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None:
        raise CorruptHeader("no TIFF")
    big = struct.unpack_from(order + "H", block, 2)[0] == 43
    word, count_word, entry_bytes = ("Q", "Q", 20) if big else ("I", "H", 12)
    (place,) = struct.unpack_from(order + word, block, 8 if big else 4)
    seen: set[int] = set()
    steps = 0
    while place and place not in seen:
        seen.add(place)
        (count,) = struct.unpack_from(order + count_word, block, place)
        steps += 1 + count
        if steps > _STEPS:
            raise CorruptHeader("directories too long")
        place += struct.calcsize(count_word)
        entries = []
        for at in range(place, place + count * entry_bytes, entry_bytes):
            tag, kind, number = struct.unpack_from(order + "HH" + word, block, at)
            value_at = at + (12 if big else 8)
            (value,) = struct.unpack_from(order + ("H" if kind == 3 else "I"), block, value_at)
            entries.append((tag, number * _TYPE_BYTES.get(kind, 1), value))
        yield entries
        (place,) = struct.unpack_from(order + word, block, place + count * entry_bytes)


_WALKS: dict[ImageFormat, Callable[[bytes, Header], None]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "GIF": _gif,
    "WEBP": _webp,
    "TIFF": _tiff,
}
