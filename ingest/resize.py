"""From the pixels of a picture to the wanted size: which part of it, how large, and by which filter.

Down by the exact area average (OpenCV's INTER_AREA, img2dataset's choice), up by Lanczos. Pillow's BOX filter weighs
whole pixels only: at 3:2 it is 4 dB further from the area average than this.
"""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

cv2.setNumThreads(1)

Pixels = NDArray[np.uint8]  # height, width, RGB
ResizeMode = Literal["center_crop", "keep_ratio", "pad"]


@dataclass(frozen=True)
class Plan:
    """`box` (left, top, width, height) of the source becomes `target` (width, height)."""

    box: tuple[int, int, int, int]
    target: tuple[int, int]

    @property
    def shrinks(self) -> bool:
        return self.box[2] >= self.target[0] and self.box[3] >= self.target[1]

    @property
    def is_done(self) -> bool:
        return self.box[2:] == self.target


def plan(width: int, height: int, size: int, mode: ResizeMode) -> Plan:
    if mode == "center_crop":
        side = min(width, height)
        return Plan(((width - side) // 2, (height - side) // 2, side, side), (size, size))
    reference = min(width, height) if mode == "keep_ratio" else max(width, height)
    target = (max(1, round(width * size / reference)), max(1, round(height * size / reference)))
    return Plan((0, 0, width, height), target)


def jpeg_denominator(width: int, height: int, size: int, mode: ResizeMode) -> int:
    """By how much a JPEG may be shrunk inside its decoder (the DCT): 1, 2, 4 or 8.

    Only to the very size that is wanted, where it is as near to the area average as JPEG is to the picture; or to at
    least twice of it. In between, what the DCT lets through is folded by the second resize: up to 2 dB are lost.
    """
    wanted = plan(width, height, size, mode).target
    for denominator in (8, 4, 2):
        scaled = plan(-(-width // denominator), -(-height // denominator), size, mode)
        exact = scaled.is_done and scaled.target == wanted
        if exact or (scaled.box[2] >= 2 * wanted[0] and scaled.box[3] >= 2 * wanted[1]):
            return denominator
    return 1


def resized(pixels: Pixels, how: Plan) -> Pixels:
    left, top, width, height = how.box
    part = pixels[top : top + height, left : left + width]
    if how.is_done:
        return part
    if how.shrinks:
        return area(part, how.target)
    return np.asarray(Image.fromarray(part).resize(how.target, Image.Resampling.LANCZOS))


def area(pixels: Pixels, target: tuple[int, int]) -> Pixels:
    return cv2.resize(pixels, target, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Turned and mirrored as EXIF's orientation says."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def padded(pixels: Pixels, size: int) -> Pixels:
    """In the middle of a white square."""
    height, width = pixels.shape[:2]
    square = np.full((size, size, 3), 255, np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square
