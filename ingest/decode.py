"""Bytes of a picture from anywhere → an RGB picture of the wanted size, encoded again; or why not.

Format and pixel count are read from the header before anything is decoded. The result carries no metadata, and equal
input gives equal bytes. A picture that ends early is undecodable: half an image is worse than none.
"""

import hashlib
import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ingest.decode_config import DecodeConfig
from ingest.filters import Filters
from ingest.outcome import Decoded as Decoded
from ingest.outcome import Outcome, Status

# The limit is ours and is checked before decoding; Pillow's would warn from worker threads and raise at its own size.
Image.MAX_IMAGE_PIXELS = None

_ORIENTATION = 0x0112
_SWAPS_SIDES = frozenset({5, 6, 7, 8})
_PILLOW_FORMAT = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


class _Rejected(Exception):
    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


def decode(body: bytes, config: DecodeConfig, filters: Filters, url: str = "", caption: str = "") -> Decoded:
    """Never raises for what bytes hold."""
    image_sha256 = hashlib.sha256(body).hexdigest()
    original: tuple[int, int] | None = None
    try:
        image = _opened(body, config)
        original = _upright_size(image)
        _check_size(original, config)
        picture = resized(_loaded(image, config), config)
        data = encoded(picture, config)
    except _Rejected as rejected:
        width, height = original or (None, None)
        outcome = Outcome(rejected.status, rejected.reason, image_sha256, original_width=width, original_height=height)
        return Decoded(None, outcome)
    outcome = Outcome(
        Status.OK,
        image_sha256=image_sha256,
        stored_sha256=hashlib.sha256(data).hexdigest(),
        width=picture.width,
        height=picture.height,
        original_width=original[0],
        original_height=original[1],
    )
    return Decoded(data, outcome)


def _opened(body: bytes, config: DecodeConfig) -> Image.Image:
    """The picture with only its header read."""
    try:
        return Image.open(io.BytesIO(body), formats=config.accept)
    except UnidentifiedImageError:
        head = body[:256].lstrip().lower()
        if head.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
            raise _Rejected(Status.UNDECODABLE, "html") from None
        raise _Rejected(Status.UNDECODABLE, "unknown_format") from None
    except Exception:
        raise _Rejected(Status.UNDECODABLE, "corrupt_header") from None


def _upright_size(image: Image.Image) -> tuple[int, int]:
    # A PNG's EXIF may lie behind its pixels, and reading it would decode them: only what the header brought counts.
    if "exif" in image.info and _orientation(image) in _SWAPS_SIDES:
        return image.height, image.width
    return image.size


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _check_size(size: tuple[int, int], config: DecodeConfig) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise _Rejected(Status.UNDECODABLE, "corrupt_header")
    if width * height > config.max_pixels:
        raise _Rejected(Status.REFUSED, "too_many_pixels")
    filters = config.filters
    if filters.min_side is not None and min(size) < filters.min_side:
        raise _Rejected(Status.FILTERED, "too_small")
    if filters.max_aspect_ratio is not None and max(size) > filters.max_aspect_ratio * min(size):
        raise _Rejected(Status.FILTERED, "aspect_ratio")


def _loaded(image: Image.Image, config: DecodeConfig) -> Image.Image:
    """All pixels, upright, RGB."""
    try:
        if image.format in ("JPEG", "MPO") and config.resize != "pad":
            # libjpeg scales by 1/2, 1/4, 1/8 inside the DCT, and never below the size asked for here.
            image.draft(None, (config.size, config.size))
        image.load()
        if "exif" in image.info and 2 <= _orientation(image) <= 8:
            image = ImageOps.exif_transpose(image)
        return to_rgb(image)
    except _Rejected:
        raise
    except MemoryError:
        raise _Rejected(Status.UNDECODABLE, "memory") from None
    except Exception:
        # A native decoder's complaint is its own affair; its wording changes between versions and is not content.
        raise _Rejected(Status.UNDECODABLE, "corrupt_image") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode → RGB: 16 bits are scaled, not clipped; alpha goes over white."""
    if image.mode == "RGB":
        if "transparency" not in image.info:
            return image
        image = image.convert("RGBA")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise _Rejected(Status.UNDECODABLE, "pixel_range")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise _Rejected(Status.UNDECODABLE, "pixel_range")
    if image.mode in ("P", "L", "1") and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def resized(image: Image.Image, config: DecodeConfig) -> Image.Image:
    """To `config.size`: down by area average, up by Lanczos."""
    width, height = image.size
    size = config.size
    if config.resize == "center_crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        if side == size:
            return image if width == height else image.crop((int(left), int(top), int(left) + side, int(top) + side))
        return image.resize((size, size), _filter(side, size), box=(left, top, left + side, top + side))
    reference = min(width, height) if config.resize == "keep_ratio" else max(width, height)
    scaled = (max(1, round(width * size / reference)), max(1, round(height * size / reference)))
    if scaled != image.size:
        image = image.resize(scaled, _filter(reference, size))
    if config.resize == "pad":
        canvas = Image.new("RGB", (size, size), (255, 255, 255))
        canvas.paste(image, ((size - scaled[0]) // 2, (size - scaled[1]) // 2))
        return canvas
    return image


def _filter(source: int, target: int) -> Image.Resampling:
    return Image.Resampling.BOX if source > target else Image.Resampling.LANCZOS


def encoded(image: Image.Image, config: DecodeConfig) -> bytes:
    """Without metadata: Pillow would copy what it finds in `info`."""
    image.info = {}
    packed = io.BytesIO()
    if config.format == "png":
        image.save(packed, "PNG", compress_level=6)
    else:
        image.save(packed, _PILLOW_FORMAT[config.format], quality=config.quality)
    return packed.getvalue()
