"""Our pictures against img2dataset's way of making them, both measured by a float64 area average of the original."""

import io
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ingest.decode import decode
from ingest.decode_config import DecodeConfig
from ingest.filters import Filters

SIZE = 256
Picture = NDArray[np.float64]


def natural(seed: int, width: int, height: int) -> NDArray[np.uint8]:
    """Noise with the spectrum of photographs, correlated between channels, and shapes with hard edges."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    layers = []
    for _ in range(4):
        spectrum = (random.normal(size=frequency.shape) + 1j * random.normal(size=frequency.shape)) / frequency**1.2
        layer = np.fft.irfft2(spectrum, s=(height, width))
        layers.append(layer / layer.std())
    pixels = np.stack([0.8 * layers[3] + 0.35 * layer for layer in layers[:3]], axis=-1) * 45 + 128
    rows, columns = np.mgrid[:height, :width]
    for _ in range(20):
        x, y, radius = random.uniform(0, width), random.uniform(0, height), random.uniform(5, 90)
        inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
        pixels[inside] = 0.4 * pixels[inside] + 0.6 * random.uniform(0, 255, 3)
    return pixels.clip(0, 255).astype(np.uint8)


def as_jpeg(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return file.getvalue()


def shares(source: int, start: int, length: int, target: int) -> Picture:
    """How much of each source pixel falls into each target pixel, by the areas that they have in common."""
    edges = start + np.arange(target + 1) * length / target
    pixels = np.arange(source)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return overlap.clip(0) * target / length


def reference(body: bytes) -> Picture:
    """The middle square of the decoded original, averaged over areas in float64."""
    pixels = np.asarray(Image.open(io.BytesIO(body)), np.float64)
    height, width = pixels.shape[:2]
    side = min(height, width)
    down = shares(height, (height - side) // 2, side, SIZE)
    across = shares(width, (width - side) // 2, side, SIZE)
    return np.einsum("ih,hwc,jw->ijc", down, pixels, across, optimize=True)


def ours(body: bytes, quality: int) -> bytes:
    config = DecodeConfig(size=SIZE, quality=quality)
    data = decode(body, config, Filters(config.filters, {})).data
    assert data is not None
    return data


def theirs(body: bytes, quality: int) -> bytes:
    """img2dataset's resizer (center_crop, INTER_AREA, jpg), without its padding and EXIF code."""
    pixels = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR)
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    small = cv2.resize(pixels[top : top + side, left : left + side], (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def psnr(picture: Picture, wanted: Picture) -> float:
    return float(10 * np.log10(255**2 / np.mean((picture - wanted) ** 2)))


def ssim(picture: Picture, wanted: Picture) -> float:
    """Mean over 8 × 8 blocks and channels (Wang et al. 2004, with blocks for its window)."""

    def blocks(values: Picture) -> Picture:
        return values.reshape(SIZE // 8, 8, SIZE // 8, 8, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 64)

    a, b = blocks(picture), blocks(wanted)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = a.mean(axis=1), b.mean(axis=1)
    together = ((a - mean_a[:, None]) * (b - mean_b[:, None])).mean(axis=1)
    likeness = (2 * mean_a * mean_b + c1) * (2 * together + c2)
    return float((likeness / ((mean_a**2 + mean_b**2 + c1) * (a.var(axis=1) + b.var(axis=1) + c2))).mean())


def at_file_size(make: Callable[[bytes, int], bytes], body: bytes, wanted: Picture, size: int) -> tuple[float, float]:
    """PSNR and SSIM that a way of making pictures reaches at a file size, between qualities on either side of it."""
    points = []
    for quality in range(89, 99, 2):
        data = make(body, quality)
        picture = np.asarray(Image.open(io.BytesIO(data)), np.float64)
        points.append((len(data), psnr(picture, wanted), ssim(picture, wanted)))
    sizes, psnrs, ssims = zip(*points, strict=True)
    return float(np.interp(size, sizes, psnrs)), float(np.interp(size, sizes, ssims))


@pytest.mark.parametrize("shape", [(512, 512), (512, 384), (640, 480), (1024, 1024), (1040, 1040)])
def test_pictures_are_as_good_as_img2datasets_at_the_same_file_size(shape: tuple[int, int]):
    gains = []
    for seed in range(3):
        body = as_jpeg(natural(seed, *shape))
        wanted, size = reference(body), len(theirs(body, 95))
        a, b = at_file_size(ours, body, wanted, size), at_file_size(theirs, body, wanted, size)
        gains.append((a[0] - b[0], a[1] - b[1]))
    psnr_gain, ssim_gain = np.mean(gains, axis=0)
    assert psnr_gain > -0.1 and ssim_gain > -0.0015, (psnr_gain, ssim_gain)


def test_without_the_encoder_the_area_average_is_exact():
    pixels = natural(0, 500, 333)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    config = DecodeConfig(size=SIZE, format="png")
    data = decode(file.getvalue(), config, Filters(config.filters, {})).data
    assert data is not None
    assert np.abs(np.asarray(Image.open(io.BytesIO(data)), np.float64) - reference(file.getvalue())).max() < 1.01


def test_large_pictures_shrunk_in_bands_are_the_same_area_average():
    pixels = np.tile(natural(1, 600, 475), (4, 4, 1))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "BMP")
    config = DecodeConfig(size=SIZE, format="png")
    data = decode(file.getvalue(), config, Filters(config.filters, {})).data
    assert data is not None
    assert np.abs(np.asarray(Image.open(io.BytesIO(data)), np.float64) - reference(file.getvalue())).max() < 1.6
