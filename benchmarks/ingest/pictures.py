"""The benchmark's pictures: JPEGs whose smaller side is 512 px and that weigh about 50 KB, the same ones every time.

Each is a few crops of 1/f noise (the spectrum of photographs) in three planes, with edges drawn over them and a little
sensor noise, so that a JPEG coder and a resizer meet what they meet in photographs. No two are alike.
"""

from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE = 512
LONGER_SIDES = (512, 512, 576, 640, 684)
QUALITY = 75
_CANVAS = 1024


def make_pictures(folder: Path, count: int, *, seed: int = 0, processes: int = 2, side: int = SIDE) -> None:
    """`count` files `00000.jpg` … in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        shares = [range(rank, count, processes) for rank in range(processes)]
        list(pool.map(_make, [folder] * processes, shares, [seed] * processes, [side] * processes))


def _make(folder: Path, numbers: range, seed: int, side: int) -> None:
    for number in numbers:
        picture(number, seed, side).save(folder / f"{number:05d}.jpg", "JPEG", quality=QUALITY)


def picture(number: int, seed: int = 0, side: int = SIDE) -> Image.Image:
    rng = np.random.default_rng((seed, number))
    longer = LONGER_SIDES[rng.integers(len(LONGER_SIDES))] * side // SIDE // 4 * 4
    width, height = (side, longer) if rng.random() < 0.5 else (longer, side)
    light = _crop(rng, height, width) * 46 + _crop(rng, height, width) * 20
    colour = _crop(rng, height, width) * 14
    tint = rng.uniform(70, 180, 3).astype(np.float32)
    light += rng.integers(-1, 2, (height, width), dtype=np.int8)
    planes = (light + tint[0] + colour, light + tint[1], light + tint[2] - colour)
    pixels_HWC = np.stack([plane.clip(0, 255).astype(np.uint8) for plane in planes], axis=-1)
    image = Image.fromarray(pixels_HWC)
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y = rng.integers(width), rng.integers(height)
        w, h = rng.integers(10, width // 3), rng.integers(10, height // 3)
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape(
            (x, y, x + w, y + h), outline=tuple(int(v) for v in rng.integers(0, 256, 3)), width=int(rng.integers(1, 5))
        )
    return image


def _crop(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A window of one of a few planes of 1/f noise, of mean 0 and deviation 1."""
    plane = _plane(int(rng.integers(6)))
    top, left = rng.integers(_CANVAS - height), rng.integers(_CANVAS - width)
    window = plane[top : top + height, left : left + width]
    return window[:, ::-1] if rng.random() < 0.5 else window


@cache
def _plane(number: int) -> np.ndarray:
    rng = np.random.default_rng(number)
    down, across = np.meshgrid(np.fft.fftfreq(_CANVAS), np.fft.rfftfreq(_CANVAS), indexing="ij")
    spectrum = (
        np.fft.rfft2(rng.standard_normal((_CANVAS, _CANVAS))) / np.maximum(np.hypot(down, across), 1 / _CANVAS) ** 1.4
    )
    plane = np.fft.irfft2(spectrum)
    return ((plane - plane.mean()) / plane.std()).astype(np.float32)
