import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from PIL import Image

from ingest.config import ImagesConfig
from ingest.decode import decode as decode_with
from ingest.decode_config import FiltersConfig
from ingest.filters import Filters
from ingest.outcome import Decoded, Status


def settings(**changed: object) -> ImagesConfig:
    return ImagesConfig(**{"size": 32, "format": "png", **changed})  # type: ignore[arg-type]


def decode(body: bytes, config: ImagesConfig) -> Decoded:
    return decode_with(body, config, Filters(config.filters, {}))


def packed(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(decoded: Decoded) -> np.ndarray:
    assert decoded.data is not None, decoded.outcome
    return np.asarray(Image.open(io.BytesIO(decoded.data)))


def flat(mode: str, value: object, size: tuple[int, int] = (40, 40)) -> Image.Image:
    return Image.new(mode, size, value)  # type: ignore[arg-type]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def reason(body: bytes, **changed: object) -> tuple[Status, str | None]:
    decoded = decode(body, settings(**changed))
    assert decoded.data is None
    return decoded.outcome.status, decoded.outcome.reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_accepted_format_becomes_the_wanted_picture(kind: str):
    decoded = decode(packed(flat("RGB", (200, 100, 50), (64, 48)), kind), settings())
    assert pixels(decoded).shape == (32, 32, 3)
    assert np.abs(pixels(decoded).astype(int) - (200, 100, 50)).max() <= 4
    outcome = decoded.outcome
    assert (outcome.width, outcome.height, outcome.original_width, outcome.original_height) == (32, 32, 64, 48)


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.full((40, 40), 0x8000, np.uint16)
    values[:, :20] = 0x2000
    for kind in ("PNG", "TIFF"):
        result = pixels(decode(packed(Image.fromarray(values), kind), settings()))
        assert abs(int(result[5, 5, 0]) - 0x20) <= 1 and abs(int(result[5, 30, 0]) - 0x80) <= 1


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        (flat("L", 77), (77, 77, 77)),
        (flat("1", 1), (255, 255, 255)),
        (flat("RGBA", (255, 0, 0, 0)), (255, 255, 255)),
        (flat("RGBA", (255, 0, 0, 128)), (255, 127, 127)),
        (flat("LA", (0, 51)), (204, 204, 204)),
        (flat("RGB", (9, 8, 7)).quantize(4), (9, 8, 7)),
    ],
)
def test_every_mode_becomes_rgb_with_alpha_over_white(image: Image.Image, wanted: tuple[int, int, int]):
    assert np.abs(pixels(decode(packed(image), settings())).astype(int) - wanted).max() <= 1


def test_transparent_palettes_and_colour_keys_go_over_white():
    palette = flat("P", 0)
    palette.putpalette([250, 0, 0, 0, 250, 0])
    assert (pixels(decode(packed(palette, transparency=0), settings())) == 255).all()
    assert (pixels(decode(packed(flat("RGB", (1, 2, 3)), transparency=(1, 2, 3)), settings())) == 255).all()


def test_cmyk_becomes_rgb():
    body = packed(flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=95)
    red, green, blue = pixels(decode(body, settings()))[16, 16].astype(int)
    assert red > 200 and green < 60 and blue < 60


def test_exif_orientation_is_applied_and_metadata_stripped():
    image = Image.new("RGB", (60, 40), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 60, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by a quarter: the red upper half comes to the right
    exif[0x010E] = "secret"
    for form in ("png", "jpg", "webp"):
        decoded = decode(packed(image, "JPEG", quality=95, exif=exif), settings(format=form))
        result = pixels(decoded)
        assert result[16, 28, 0] > 200 and result[16, 3, 2] > 200
        assert (decoded.outcome.original_width, decoded.outcome.original_height) == (40, 60)
        assert decoded.data is not None and b"secret" not in decoded.data and b"Exif" not in decoded.data


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_picture_that_ends_early_is_undecodable_never_half(kind: str, share: float):
    body = packed(noise(80, 80), kind)
    status, why = reason(body[: int(len(body) * share)])
    assert status == Status.UNDECODABLE and why in ("corrupt_image", "corrupt_header", "unknown_format")


def png_of(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_from_its_header():
    assert reason(png_of(60_000, 60_000, 8, 2, bytes(1000))) == (Status.REFUSED, "too_many_pixels")
    assert reason(packed(flat("RGB", 0, (50, 50))), max_pixels=2499) == (Status.REFUSED, "too_many_pixels")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"<!DOCTYPE html><html></html>", "html"),
        (b"  <HTML><body>no</body></html>", "html"),
        (b"not a picture", "unknown_format"),
        (b"\0" * 100, "unknown_format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unknown_format"),
    ],
)
def test_what_is_no_picture_is_undecodable(body: bytes, why: str):
    assert reason(body) == (Status.UNDECODABLE, why)


def test_formats_that_are_not_accepted_are_not_read():
    assert reason(packed(flat("RGB", 0), "GIF"), accept=("JPEG", "PNG")) == (Status.UNDECODABLE, "unknown_format")
    assert reason(packed(flat("RGB", 0), "PPM")) == (Status.UNDECODABLE, "unknown_format")


def test_the_first_frame_of_an_animation_is_taken():
    frames = [flat("RGB", colour) for colour in ((250, 0, 0), (0, 250, 0))]
    body = packed(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(decode(body, settings()))[0, 0].tolist() == [250, 0, 0]


def test_resize_modes():
    image = Image.new("RGB", (120, 60), (0, 0, 255))
    image.paste((255, 0, 0), (30, 0, 90, 60))
    body = packed(image)
    assert (pixels(decode(body, settings())) == (255, 0, 0)).all()
    kept = pixels(decode(body, settings(resize="keep_ratio")))
    assert kept.shape == (32, 64, 3) and kept[0, 0].tolist() == [0, 0, 255]
    padded = pixels(decode(body, settings(resize="pad")))
    assert padded.shape == (32, 32, 3) and padded[0, 0].tolist() == [255] * 3 and padded[16, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("resize", ["center_crop", "keep_ratio", "pad"])
def test_every_orientation_in_every_format_and_mode(kind: str, orientation: int, resize: str):
    upright = np.asarray(noise(6, 4).resize((96, 64), Image.Resampling.NEAREST))
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    body = packed(Image.fromarray(stored), kind, exif=exif, **options)
    decoded = decode(body, settings(resize=resize))
    wanted = pixels(decode(packed(Image.fromarray(upright)), settings(resize=resize))).astype(int)
    assert np.abs(pixels(decoded).astype(int) - wanted).max() <= 8
    assert (decoded.outcome.original_width, decoded.outcome.original_height) == (96, 64)


@pytest.mark.parametrize("scale", [1, 2])
def test_inverted_cmyk_is_what_pillow_shows(scale: int):
    image = noise(8, 8).resize((32 * scale, 32 * scale), Image.Resampling.NEAREST).convert("CMYK")
    body = packed(image, "JPEG", quality=100, subsampling=0)  # with Adobe's marker, inverted
    shown = np.asarray(Image.open(io.BytesIO(body)).convert("RGB")).astype(float)
    wanted = shown.reshape(32, scale, 32, scale, 3).mean(axis=(1, 3))
    assert np.abs(pixels(decode(body, settings())) - wanted).max() <= 2


def test_sixteen_bits_of_colour_are_scaled_too():
    values = np.full((40, 40, 3), (0x8000, 0x2000, 0xFFFF), np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    body = png_of(40, 40, 16, 2, rows)
    assert np.abs(pixels(decode(body, settings())).astype(int) - (0x80, 0x20, 0xFF)).max() <= 1


def test_transparent_pixels_weigh_nothing_in_the_mean():
    layer = np.zeros((64, 64, 4), np.uint8)
    layer[::2] = (255, 0, 0, 255)
    layer[1::2] = (0, 0, 0, 0)  # black, and not to be seen: white shows
    assert np.abs(pixels(decode(packed(Image.fromarray(layer)), settings())).astype(int) - (255, 128, 128)).max() <= 1


def test_downscaling_is_the_mean_of_the_area():
    values = np.asarray(noise(96, 96)).astype(np.float64)
    wanted = values.reshape(32, 3, 32, 3, 3).mean(axis=(1, 3))
    assert (
        np.abs(pixels(decode(packed(noise(96, 96)), settings())) - wanted).max() <= 1
    )  # rounded twice: rows, then columns


def test_small_pictures_are_enlarged():
    assert pixels(decode(packed(flat("RGB", (10, 20, 30), (5, 5))), settings())).shape == (32, 32, 3)


def test_scaling_inside_the_jpeg_decoder_gives_the_same_picture():
    gradient = np.add.outer(np.arange(256), np.arange(256))[..., None] * np.array([0.5, 0.4, 0.3])
    image = Image.fromarray(gradient.astype(np.uint8))
    fast = pixels(decode(packed(image, "JPEG", quality=95), settings())).astype(int)
    exact = pixels(decode(packed(image), settings())).astype(int)
    assert np.abs(fast - exact).mean() < 1.5


def test_filters_are_off_unless_set():
    body = packed(flat("RGB", 0, (90, 30)))
    assert decode(body, settings()).outcome.status == Status.OK
    assert reason(body, filters=FiltersConfig(max_aspect_ratio=2)) == (Status.FILTERED, "aspect_ratio")
    assert reason(body, filters=FiltersConfig(min_side=31)) == (Status.FILTERED, "too_small")


def test_equal_bytes_in_equal_bytes_out():
    for form in ("png", "jpg", "webp"):
        bodies = {decode(packed(noise(70, 50)), settings(format=form)).data for _ in range(3)}
        assert len(bodies) == 1


@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]), st.data())
@settings_of_hypothesis(max_examples=150)
def test_mutated_pictures_end_in_a_state_and_never_raise(kind: str, data: st.DataObject):
    body = bytearray(packed(noise(24, 24), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoded = decode(bytes(body), settings(max_pixels=1_000_000))
    assert (decoded.data is not None) == (decoded.outcome.status == Status.OK)
    assert decoded.data is None or pixels(decoded).shape == (32, 32, 3)
