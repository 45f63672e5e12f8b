"""Bytes of a picture from anywhere → an RGB picture of the wanted size, encoded again; or why not.

Block-list, header, limits and filters on size come before anything is decoded. The result carries no metadata, and
equal input gives equal bytes. A picture that ends early is undecodable: half an image is worse than none.
"""

import hashlib
import io

import cv2
from PIL import Image

from ingest.decode_config import DecodeConfig
from ingest.filters import Filters
from ingest.header import CorruptData, CorruptHeader, Header, read_header, sniffed
from ingest.outcome import Decoded, Outcome, Status
from ingest.perceptual import THUMBNAIL
from ingest.pixels import PixelRange, UnsupportedCompression, jpeg_rows, opened, pillow_rows
from ingest.resize import Pixels, Plan, padded, plan, upright

# A BMP of width -1 says 4294967295. What the ledger's columns hold is more than any format's honest side.
_MAX_SIDE = 2**31 - 1
_SWAPS_SIDES = frozenset({5, 6, 7, 8})
# Pillow's WEBP decoder keeps four copies of the picture, and says no more than that it failed when one does not fit.
_WEBP_BYTES_PER_PIXEL = 16


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
        _keep(filters.body(body))
        header = _header(body, config)
        if header.size is not None:
            original = _upright_size(header.size, header)
            _check_size(original, config)
        _check_weight(header, config)
        image = None
        if header.format != "JPEG":
            image = _opened(body, header)
            original = _upright_size(image.size, header)
            _check_size(original, config)
        picture, thumbnail = _pixels(body, image, header, config, filters.needs_thumbnail)
        _keep(filters.picture(picture, thumbnail, url, caption))
        data = encoded(picture, config)
    except _Rejected as rejected:
        width, height = original or (None, None)
        outcome = Outcome(rejected.status, rejected.reason, image_sha256, original_width=width, original_height=height)
        return Decoded(None, outcome)
    outcome = Outcome(
        Status.OK,
        image_sha256=image_sha256,
        stored_sha256=hashlib.sha256(data).hexdigest(),
        width=picture.shape[1],
        height=picture.shape[0],
        original_width=original[0] if original else None,
        original_height=original[1] if original else None,
    )
    return Decoded(data, outcome)


def _keep(reason: str | None) -> None:
    if reason is not None:
        raise _Rejected(Status.FILTERED, reason)


def _header(body: bytes, config: DecodeConfig) -> Header:
    image_format = sniffed(body)
    if image_format is None or image_format not in config.accept:
        head = body[:256].lstrip().lower()
        is_html = head.startswith((b"<!doctype html", b"<html", b"<head", b"<body"))
        raise _Rejected(Status.UNDECODABLE, "html" if is_html else "unknown_format")
    try:
        return read_header(body, image_format)
    except CorruptHeader:
        raise _Rejected(Status.UNDECODABLE, "corrupt_header") from None
    except CorruptData:
        raise _Rejected(Status.UNDECODABLE, "corrupt_image") from None
    except MemoryError:
        raise _Rejected(Status.UNDECODABLE, "memory") from None


def _opened(body: bytes, header: Header) -> Image.Image:
    try:
        return opened(body, header)
    except CorruptHeader:
        raise _Rejected(Status.UNDECODABLE, "corrupt_header") from None
    except MemoryError:
        raise _Rejected(Status.UNDECODABLE, "memory") from None


def _upright_size(size: tuple[int, int], header: Header) -> tuple[int, int]:
    if max(size) > _MAX_SIDE:
        raise _Rejected(Status.UNDECODABLE, "corrupt_header")
    return (size[1], size[0]) if header.orientation in _SWAPS_SIDES else size


def _check_size(size: tuple[int, int], config: DecodeConfig) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise _Rejected(Status.UNDECODABLE, "corrupt_header")
    if width * height > config.max_pixels:
        raise _Rejected(Status.REFUSED, "too_many_pixels")
    filters = config.filters
    if filters.min_side is not None and min(size) < filters.min_side:
        _keep("too_small")
    if filters.max_aspect_ratio is not None and max(size) > filters.max_aspect_ratio * min(size):
        _keep("aspect_ratio")


def _check_weight(header: Header, config: DecodeConfig) -> None:
    if header.frames > config.max_frames:
        raise _Rejected(Status.REFUSED, "too_many_frames")
    if header.icc_bytes > config.max_icc_bytes:
        raise _Rejected(Status.REFUSED, "icc_too_large")
    if header.metadata_bytes > config.max_metadata_bytes:
        raise _Rejected(Status.REFUSED, "metadata_too_large")
    if header.format == "WEBP" and header.size is not None:
        width, height = header.size
        if width * height * _WEBP_BYTES_PER_PIXEL > config.decode_memory_bytes:
            raise _Rejected(Status.UNDECODABLE, "memory")


def _pixels(
    body: bytes, image: Image.Image | None, header: Header, config: DecodeConfig, with_thumbnail: bool
) -> tuple[Pixels, Pixels | None]:
    """Of the wanted size and upright; and, where asked for, the whole picture as small as its hash needs it."""
    try:
        whole = (
            jpeg_rows(body, header, config.size, config.resize) if image is None else pillow_rows(body, image, header)
        )
        thumbnail = None
        if with_thumbnail:
            thumbnail = upright(whole.shrunk(Plan((0, 0, whole.width, whole.height), THUMBNAIL)), header.orientation)
        pixels = upright(whole.shrunk(plan(whole.width, whole.height, config.size, config.resize)), header.orientation)
        return (padded(pixels, config.size) if config.resize == "pad" else pixels), thumbnail
    except MemoryError:
        raise _Rejected(Status.UNDECODABLE, "memory") from None
    except PixelRange:
        raise _Rejected(Status.UNDECODABLE, "pixel_range") from None
    except UnsupportedCompression:
        raise _Rejected(Status.UNDECODABLE, "unsupported_compression") from None
    except cv2.error as error:
        reason = "memory" if error.code == cv2.Error.StsNoMem else "corrupt_image"
        raise _Rejected(Status.UNDECODABLE, reason) from None
    except Exception:
        # A native decoder's complaint is its own affair; its wording changes between versions and is not content.
        raise _Rejected(Status.UNDECODABLE, "corrupt_image") from None


def encoded(picture: Pixels, config: DecodeConfig) -> bytes:
    """Without metadata; JPEG with chroma at half size, as img2dataset writes it."""
    if config.format == "jpg":
        # Not simplejpeg's encoder: below quality 96 it takes the fast DCT, which costs 0.3 dB and saves nothing.
        blue_first = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
        return cv2.imencode(".jpg", blue_first, [cv2.IMWRITE_JPEG_QUALITY, config.quality])[1].tobytes()
    packed = io.BytesIO()
    if config.format == "png":
        Image.fromarray(picture).save(packed, "PNG", compress_level=6)
    else:
        Image.fromarray(picture).save(packed, "WEBP", quality=config.quality)
    return packed.getvalue()
