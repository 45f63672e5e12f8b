"""A 64-bit perceptual hash, that of imagehash's `phash`: near-equal pictures differ in few bits.

    grey (ITU-R 601), 32 × 32 by area average ──► two-dimensional DCT-II ──► its 8 × 8 lowest frequencies
    bit = coefficient above the median of the 64; row by row from the lowest, the first bit is the highest

It is taken of the upright picture before it is cropped, so that it does not depend on `resize`. imagehash shrinks by
Lanczos; a few bits differ from its hashes for that, which the distance of a match allows for.
"""

import cv2
import numpy as np

from ingest.resize import Pixels

_SIDE, _KEPT = 32, 8
THUMBNAIL = (_SIDE, _SIDE)
_FREQUENCY, _PLACE = np.meshgrid(np.arange(_KEPT), np.arange(_SIDE), indexing="ij")
_DCT = np.cos(np.pi * _FREQUENCY * (2 * _PLACE + 1) / (2 * _SIDE))


def perceptual_hash(thumbnail: Pixels) -> int:
    """Of the whole picture at the size of `THUMBNAIL`."""
    grey = cv2.cvtColor(thumbnail, cv2.COLOR_RGB2GRAY).astype(np.float64)
    low = (_DCT @ grey @ _DCT.T).ravel()
    bits = low > np.median(low)
    return int("".join("1" if bit else "0" for bit in bits), 2)
