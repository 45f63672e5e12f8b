"""Bodies that a picture's URL may answer with: bombs, halves, polyglots and other formats, made in code."""

import gzip
import io
import struct
import zlib

from PIL import Image

NOISE = Image.effect_noise((96, 80), 60).convert("RGB")


def packed(image: Image.Image, format_: str, **settings: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format_, **settings)
    return out.getvalue()


JPEG = packed(NOISE, "JPEG", quality=90)
PNG = packed(NOISE, "PNG")
GIF = packed(NOISE, "GIF")
WEBP = packed(NOISE, "WEBP")
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes, bits: int = 8, colour: int = 0, data: bytes | None = None) -> bytes:
    """A grey PNG whose chunks before the pixels are `extra`."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(width)) * height) if data is None else data
    return SIGNATURE + chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def zipped_zeros(size: int) -> bytes:
    squeeze = zlib.compressobj(9)
    return b"".join([*(squeeze.compress(bytes(1 << 20)) for _ in range(size >> 20)), squeeze.flush()])


def gzipped_zeros(size: int) -> bytes:
    return gzip.compress(bytes(size), mtime=0)


def gif_of_frames(count: int) -> bytes:
    """One pixel, `count` times."""
    frame = b"\x21\xf9\x04\x00\x00\x00\x00\x00\x2c\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02\x44\x01\x00"
    return b"GIF89a\x01\x00\x01\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff" + frame * count + b"\x3b"


def gif_of_size(width: int, height: int) -> bytes:
    screen = b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\x00\x00\x00\x00\x00\xff\xff\xff"
    return screen + b"\x2c\x00\x00\x00\x00" + struct.pack("<HH", width, height) + b"\x00\x02\x02\x44\x01\x00\x3b"


def jpeg_of_size(width: int, height: int) -> bytes:
    """The noise's JPEG whose header claims another size."""
    start = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:start] + struct.pack(">HH", height, width) + JPEG[start + 4 :]


def jpeg_with_segments(count: int) -> bytes:
    """As many application segments of 64 kB as asked for, in front of the picture."""
    segment = b"\xff\xed\xff\xff" + bytes(65533)
    return JPEG[:2] + segment * count + JPEG[2:]


def jpeg_of_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again: each costs a pass over all coefficients."""
    whole = packed(Image.new("L", (side, side), 90), "JPEG", progressive=True, quality=60)
    start = whole.rindex(b"\xff\xda")
    scan, end = whole[start:-2], whole[-2:]
    return whole[:start] + scan * scans + end


def webp_of_size(width: int, height: int) -> bytes:
    """An extended header that claims a canvas of that size."""
    at = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + at
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff_that_bites_its_tail() -> bytes:
    """The directory's next directory is itself; its strips lie outside the file."""
    entries = [
        (256, 4, 1, 8),
        (257, 4, 1, 8),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 1 << 30),
        (279, 4, 1, 64),
    ]
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", 8)


def bmp_of_size(width: int, height: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header + bytes(64)
