"""Reads from the picture of a scene what its caption names: dominant shape colour, background colour, position.

Every pixel is taken as a mixture, background + a · (colour − background), of the picture's own background and the one
shape colour that explains it best; `a` is how much of it is shape. So a shape that is four pixels wide, all edge,
still counts for its colour. The dominant colour is the one with the most shape; its position is the third of the
picture that its middle lies in, which is the middle of its extent: a triangle's centre of mass is off its centre.

Shapes: P pixels, K shape colours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ingest.scenes import BACKGROUND_COLOURS, SHAPE_COLOURS, Scene

ATTRIBUTES = ("background", "shape_colour", "position")
# Lone large objects stand at 0.33, 0.5 and 0.67 of the side, give or take 0.03: the thirds meet half-way.
THIRD_EDGES = (0.415, 0.585)
READ_SIZE = 64
MIXTURE_FLOOR = 0.25  # less shape than this in a pixel is a gradient of the background, or noise


@dataclass(frozen=True)
class Reading:
    """What a picture shows; None where it shows no shape at all."""

    background: str
    shape_colour: str | None
    position: tuple[int, int] | None  # thirds, (-1|0|1, -1|0|1), x right, y down

    def agrees(self, scene: Scene) -> dict[str, bool]:
        return {
            "background": self.background == scene.background,
            "shape_colour": self.shape_colour == scene.dominant.colour,
            "position": self.position == scene.dominant_position,
        }


def read_picture(picture_HWC: NDArray[np.uint8]) -> Reading:
    """The attributes of a picture of any size from 16×16 up."""
    pixels_HWC = _reduced(picture_HWC)
    height, width = pixels_HWC.shape[:2]
    background_C = _border_colour(pixels_HWC)
    background = _nearest(background_C, BACKGROUND_COLOURS)
    names = [name for name in SHAPE_COLOURS if name != background]
    difference_PC = (pixels_HWC - background_C).reshape(-1, 3)
    direction_KC = np.array([SHAPE_COLOURS[name] for name in names], dtype=np.float64) - background_C
    share_PK = np.clip(difference_PC @ direction_KC.T / np.square(direction_KC).sum(axis=1), 0, 1)
    residual_PK = np.square(difference_PC[:, None] - share_PK[..., None] * direction_KC).sum(axis=2)
    best_P = residual_PK.argmin(axis=1)
    share_P = np.take_along_axis(share_PK, best_P[:, None], axis=1)[:, 0]
    # Squared: a pixel that is mostly background says little about which colour the rest of it is.
    weight_P = np.where(share_P > MIXTURE_FLOOR, share_P**2, 0.0)
    weight_K = np.bincount(best_P, weights=weight_P, minlength=len(names))
    if weight_K.max() == 0:
        return Reading(background, None, None)
    dominant = int(weight_K.argmax())
    shape_HW = np.where(best_P == dominant, weight_P, 0.0).reshape(height, width)
    return Reading(background, names[dominant], (_third(shape_HW.sum(axis=0)), _third(shape_HW.sum(axis=1))))


def _reduced(picture_HWC: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Block means of large pictures: 64 pixels a side tell as much as 256, in a sixteenth of the time."""
    block = max(1, picture_HWC.shape[0] // READ_SIZE)
    height, width = (side // block for side in picture_HWC.shape[:2])
    blocks = picture_HWC[: height * block, : width * block].reshape(height, block, width, block, 3)
    means: NDArray[np.float64] = blocks.mean(axis=(1, 3))
    return means


def _border_colour(pixels_HWC: NDArray[np.float64]) -> NDArray[np.float64]:
    edge = max(1, pixels_HWC.shape[0] // 20)
    sides = (pixels_HWC[:edge], pixels_HWC[-edge:], pixels_HWC[:, :edge], pixels_HWC[:, -edge:])
    median: NDArray[np.float64] = np.median(np.concatenate([side.reshape(-1, 3) for side in sides]), axis=0)
    return median


def _nearest(colour_C: NDArray[np.float64], palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.square(colour_C - np.array(palette[name])).sum()))


def _third(profile: NDArray[np.float64]) -> int:
    """−1, 0 or 1: where the middle of the profile's extent lies, leaving out 1% of its weight at each end."""
    cumulative = np.concatenate([[0.0], np.cumsum(profile)]) / profile.sum()
    edges = np.arange(len(cumulative)) / len(profile)
    low, high = np.interp([0.01, 0.99], cumulative, edges)
    return int((low + high) / 2 > THIRD_EDGES[0]) + int((low + high) / 2 > THIRD_EDGES[1]) - 1
