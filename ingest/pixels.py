"""From a picture's bytes to RGB pixels of the wanted size; what is not whole is `CorruptData`.

JPEG goes through libjpeg-turbo (simplejpeg), which tells its warnings: a picture whose data ends early, closed or not,
is one of them, and Pillow would fill the rest with grey. All other formats go through Pillow. Large pictures are
turned into RGB and shrunk in bands, so that beside the decoder's own memory little more is needed.
"""

import io
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from ingest.header import CorruptData, CorruptHeader, Header
from ingest.resize import Pixels, Plan, ResizeMode, area, jpeg_denominator, resized

# The limit is ours and is checked before decoding; Pillow's would warn and raise at its own size.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_MEMORY = PngImagePlugin.MAX_TEXT_CHUNK = 1 << 20

_BAND_PIXELS = 1 << 21
# What libjpeg-turbo says of data that is not there or makes no sense. Its other warnings are about headers.
_JPEG_CORRUPT = re.compile(
    r"premature end|bad Huffman code|instead of RST|(?P<extraneous>\d+) extraneous bytes", re.IGNORECASE
)
# Some cameras write a few bytes too many in front of a marker; much more is data that was not understood.
_JPEG_EXTRANEOUS_BYTES = 256
# Old and new JPEG inside TIFF: libtiff swallows the warnings that tell half a picture.
_TIFF_JPEG = frozenset({6, 7})

# First column and row, and steps, of the passes of an interlaced PNG.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


class PixelRange(ValueError):
    """Sample values that have no agreed meaning as a picture."""


class UnsupportedCompression(ValueError):
    """Pixels packed in a way that hides whether they are whole."""


@dataclass(frozen=True)
class Rows:
    """A decoded picture, of which any part is had as RGB: `part(left, top, right, bottom)`."""

    width: int
    height: int
    part: Callable[[int, int, int, int], Pixels]

    def shrunk(self, how: Plan) -> Pixels:
        """In bands: each is first shrunk across, then all of them together down."""
        left, top, width, height = how.box
        step = max(1, _BAND_PIXELS // width)
        if step >= height or not how.shrinks:
            return resized(self.part(left, top, left + width, top + height), Plan((0, 0, width, height), how.target))
        narrow = np.empty((height, how.target[0], 3), np.uint8)
        for first in range(0, height, step):
            last = min(first + step, height)
            band = self.part(left, top + first, left + width, top + last)
            narrow[first:last] = area(band, (how.target[0], last - first))
        return area(narrow, how.target)


def jpeg_rows(body: bytes, header: Header, size: int, mode: ResizeMode) -> Rows:
    """Already smaller by a whole factor where that is as good."""
    assert header.size is not None
    denominator = jpeg_denominator(*header.size, size, mode)
    width, height = (-(-side // denominator) for side in header.size)
    least = (height, width) if denominator > 1 else (0, 0)
    colours = "CMYK" if header.components == 4 else "RGB"
    try:
        pixels = simplejpeg.decode_jpeg(body, colours, min_height=least[0], min_width=least[1])
    except ValueError as error:
        _check_warning(str(error))
        pixels = simplejpeg.decode_jpeg(body, colours, min_height=least[0], min_width=least[1], strict=False)
    if pixels.shape[:2] != (height, width):
        raise CorruptData("the size inside the data is another one")
    to_rgb = _cmyk_to_rgb if header.components == 4 else lambda part: part
    return Rows(width, height, lambda left, top, right, bottom: to_rgb(pixels[top:bottom, left:right]))


def _check_warning(said: str) -> None:
    if "Insufficient memory" in said:
        raise MemoryError
    match = _JPEG_CORRUPT.search(said)
    if match is not None and int(match["extraneous"] or 1 << 30) > _JPEG_EXTRANEOUS_BYTES:
        raise CorruptData(said)


def _cmyk_to_rgb(inverted: NDArray[np.uint8]) -> Pixels:
    """Adobe stores 255 − ink, and everybody follows."""
    ink_free = inverted.astype(np.uint16)
    return ((ink_free[..., :3] * ink_free[..., 3:] + 127) // 255).astype(np.uint8)


def opened(body: bytes, header: Header) -> Image.Image:
    """The picture with only its header read by Pillow."""
    try:
        return Image.open(io.BytesIO(header.pixels_only or body), formats=[header.format])
    except MemoryError:
        raise
    except Exception as error:
        raise CorruptHeader(str(error)) from None


def pillow_rows(body: bytes, image: Image.Image, header: Header) -> Rows:
    if header.format == "TIFF" and header.compression in _TIFF_JPEG:
        raise UnsupportedCompression
    interlaced = "interlace" in image.info
    image.load()
    if header.format == "PNG" and (interlaced or _ends_in_zeros(image)) and not _png_is_whole(body):
        raise CorruptData("the data ends before the last row")
    return Rows(*image.size, lambda left, top, right, bottom: to_rgb(image.crop((left, top, right, bottom))))


def _ends_in_zeros(image: Image.Image) -> bool:
    return not np.asarray(image.crop((0, image.height - 1, image.width, image.height))).any()


def _png_is_whole(body: bytes) -> bool:
    """Whether a PNG's data holds all rows. Pillow leaves those black that a well-formed stream does not bring."""
    width, height, depth, colour, _, _, interlace = struct.unpack_from(">IIBBBBB", body, 16)
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    passes = _ADAM7 if interlace else ((0, 0, 1, 1),)
    missing = 0
    for left, top, across, down in passes:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            missing += rows * (1 + -(-columns * bits // 8))
    stream, place = zlib.decompressobj(), 8
    while place + 8 <= len(body) and missing > 0 and not stream.eof:
        length, name = struct.unpack_from(">I4s", body, place)
        packed = body[place + 8 : place + 8 + length] if name == b"IDAT" else b""
        while packed and missing > 0:
            missing -= len(stream.decompress(packed, _BAND_PIXELS))
            packed = stream.unconsumed_tail
        place += 12 + length
    return missing <= 0


def to_rgb(image: Image.Image) -> Pixels:
    """Any mode → RGB: 16 bits are scaled, not clipped; alpha goes over white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.asarray(image)
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int32)
        if values.min() < 0 or values.max() > 65535:
            raise PixelRange
        grey = ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        raise PixelRange
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return np.asarray(Image.alpha_composite(white, layer).convert("RGB"))
    return np.asarray(image.convert("RGB"))
