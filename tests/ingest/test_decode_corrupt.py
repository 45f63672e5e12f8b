"""Half pictures, bombs and mutations: whatever bytes hold, one outcome, and never half an image."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from ingest.decode import decode
from ingest.decode_config import DecodeConfig
from ingest.filters import Filters
from ingest.outcome import Decoded, Status

KINDS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]


def run(body: bytes, **changed: object) -> Decoded:
    config = DecodeConfig(**{"size": 32, "format": "png", **changed})  # type: ignore[arg-type]
    return decode(body, config, Filters(config.filters, {}))


def end(body: bytes, **changed: object) -> tuple[Status, str | None]:
    decoded = run(body, **changed)
    assert (decoded.data is None) == (decoded.outcome.status != Status.OK)
    return decoded.outcome.status, decoded.outcome.reason


def noise(width: int = 80, height: int = 80) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(1, 256, (height, width, 3), dtype=np.uint8))


def packed(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


CORRUPT = (Status.UNDECODABLE, "corrupt_image")


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"subsampling": 0}])
@pytest.mark.parametrize("share", [0.5, 0.8, 0.97])
@pytest.mark.parametrize("size", [32, 40, 80])  # decoded at half its size, and whole
def test_a_jpeg_that_ends_early_but_is_closed_is_undecodable(options: dict[str, object], share: float, size: int):
    body = packed(noise(), "JPEG", **options)
    assert end(body, size=size) == (Status.OK, None)
    assert end(body[: int(len(body) * share)] + b"\xff\xd9", size=size) == CORRUPT


def test_a_jpeg_with_a_hole_in_its_data_is_undecodable():
    body = packed(noise(), "JPEG", restart_marker_rows=1)
    middle = len(body) // 2
    assert end(body[:middle] + body[middle + 1000 :]) == CORRUPT


def test_a_few_stray_bytes_before_the_end_of_a_jpeg_do_no_harm_and_many_do():
    body = packed(noise(), "JPEG")
    assert end(body[:-2] + bytes(20) + body[-2:]) == (Status.OK, None)
    assert end(body[:-2] + bytes(2000) + body[-2:]) == CORRUPT
    assert end(body + b"<!-- behind the end -->" * 100) == (Status.OK, None)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(pixels: np.ndarray, kept: float = 1.0, interlaced: bool = False, extra: bytes = b"") -> bytes:
    """Of RGB pixels; its well-formed stream holds only a share of the rows."""
    height, width = pixels.shape[:2]
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = [
        b"\0" + pixels[row, left::across].tobytes()
        for top, left, down, across in passes
        for row in range(top, height, down)
    ]
    raw = b"".join(rows)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, int(interlaced))
    data = zlib.compress(raw[: int(len(raw) * kept)])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("interlaced", [False, True])
def test_a_png_whose_stream_ends_well_but_early_is_undecodable(interlaced: bool):
    pixels = np.asarray(noise(40, 40))
    assert end(png(pixels, interlaced=interlaced)) == (Status.OK, None)
    for share in (0.5, 0.9, 0.999):
        assert end(png(pixels, share, interlaced)) == CORRUPT


@pytest.mark.parametrize("interlaced", [False, True])
def test_a_png_that_is_black_at_its_end_is_whole(interlaced: bool):
    assert end(png(np.zeros((40, 40, 3), np.uint8), interlaced=interlaced)) == (Status.OK, None)


def test_a_png_whose_checksum_fails_is_undecodable():
    body = bytearray(png(np.asarray(noise(40, 40))))
    body[-20] ^= 1
    assert end(bytes(body)) == CORRUPT


def test_jpeg_inside_tiff_is_not_taken():
    assert end(packed(noise(), "TIFF", compression="jpeg")) == (Status.UNDECODABLE, "unsupported_compression")


def test_frames_are_counted_before_any_is_decoded():
    frames = [Image.new("RGB", (20, 20), (20 * index, 255 - 20 * index, 90)) for index in range(12)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        body = packed(frames[0], kind, save_all=True, append_images=frames[1:])
        assert end(body, max_frames=12) == (Status.OK, None), kind
        assert end(body, max_frames=11) == (Status.REFUSED, "too_many_frames"), kind
    body = packed(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert end(body, max_frames=12) == (Status.OK, None)
    assert end(body, max_frames=11) == (Status.REFUSED, "too_many_frames")


def test_a_ring_of_tiff_directories_is_walked_once():
    body = bytearray(packed(noise(), "TIFF"))
    (first,) = struct.unpack_from("<I", body, 4)
    (entries,) = struct.unpack_from("<H", body, first)
    struct.pack_into("<I", body, first + 2 + 12 * entries, first)
    assert end(bytes(body)) == (Status.OK, None)


def test_places_far_outside_of_the_file_are_corrupt_headers():
    for head in (b"II*\0\xff\xff\xff\xff", b"MM\0+\0\x08\0\0" + b"\xff" * 8, b"II+\0\x08\0\0\0" + b"\xff" * 8):
        assert end(head + bytes(100)) == (Status.UNDECODABLE, "corrupt_header")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_large_profiles_and_metadata_are_refused(kind: str):
    profile, exif = bytes(range(256)) * 500, Image.Exif()
    exif[0x010E] = "x" * 50_000
    body = packed(noise(), kind, icc_profile=profile)
    assert end(body, max_icc_bytes=1_000_000) == (Status.OK, None)
    stored = 100 if kind == "PNG" else 100_000  # PNG packs it
    assert end(body, max_icc_bytes=stored) == (Status.REFUSED, "icc_too_large")
    if kind == "TIFF":  # its tags are the metadata
        return
    body = packed(noise(), kind, exif=exif)
    assert end(body, max_metadata_bytes=60_000) == (Status.OK, None)
    assert end(body, max_metadata_bytes=10_000) == (Status.REFUSED, "metadata_too_large")


def test_packed_text_in_a_png_is_never_unpacked():
    bomb = zlib.compress(bytes(200_000_000), 9)
    pixels = np.asarray(noise(40, 40))
    for name, head in ((b"zTXt", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0"), (b"iCCP", b"p\0\0")):
        assert end(png(pixels, extra=chunk(name, head + bomb))) == (Status.OK, None), name
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 3_000_000, zip=True)
    assert end(packed(noise(), "PNG", pnginfo=text)) == (Status.OK, None)


def test_a_small_screen_with_a_vast_frame_is_refused():
    body = bytearray(packed(noise(), "GIF"))
    place = body.index(b"\x2c", 13 + 768)
    struct.pack_into("<HH", body, place + 5, 60_000, 60_000)
    assert end(bytes(body)) == (Status.REFUSED, "too_many_pixels")


def test_vast_webp_pictures_are_refused_before_a_canvas_is_made():
    extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (16382).to_bytes(3, "little") * 2
    body = b"RIFF" + struct.pack("<I", 4 + len(extended)) + b"WEBP" + extended
    assert end(body) == (Status.REFUSED, "too_many_pixels")
    assert end(body, max_pixels=300_000_000) == (Status.UNDECODABLE, "memory")


@given(st.sampled_from(KINDS), st.data())
@settings_of_hypothesis(max_examples=200)
def test_mutated_and_spliced_pictures_end_in_a_state_and_never_raise(kind: str, data: st.DataObject):
    body = bytearray(packed(noise(24, 24), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(body) - 1))
        match data.draw(st.sampled_from(["set", "flip", "cut", "drop", "splice"])):
            case "set":
                body[place] = data.draw(st.integers(0, 255))
            case "flip":
                body[place] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del body[max(1, place) :]
            case "drop":
                del body[max(1, place) : place + data.draw(st.integers(1, 50))]
            case "splice":
                other = packed(noise(24, 24), data.draw(st.sampled_from(KINDS)))
                start = data.draw(st.integers(0, len(other) - 1))
                body[place:place] = other[start : start + data.draw(st.integers(1, 200))]
    decoded = run(bytes(body), max_pixels=1_000_000)
    assert (decoded.data is not None) == (decoded.outcome.status == Status.OK)
    if decoded.data is not None:
        assert np.asarray(Image.open(io.BytesIO(decoded.data))).shape == (32, 32, 3)
    else:
        assert decoded.outcome.reason is not None
