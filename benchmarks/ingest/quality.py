"""How good the stored pictures are: PSNR and SSIM against the area average of the original, computed in float64.

The reference is the centre square of the fully decoded original, averaged over exact areas; nothing is rounded before
the comparison. Quality is compared at equal file size: each side is measured at several JPEG qualities, and read off
at the size that the peer stores.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from ingest.config import ImagesConfig
from ingest.decode import decode
from ingest.filters import Filters

SIZE = 256
QUALITIES = (91, 93, 95, 97)
STORED_QUALITY = 95


@dataclass(frozen=True)
class Quality:
    """Means over the sample."""

    bytes: float
    psnr_db: float
    ssim: float


@dataclass(frozen=True)
class Compared:
    """`*_stored`: as stored, at quality 95. `ours_same_size`: ours read off at the peer's mean size."""

    pictures: int
    ours_stored: Quality
    peer_stored: Quality
    ours_same_size: Quality


def compare(paths: list[Path], peer_folder: Path) -> Compared:
    """`peer_folder` holds what the peer stores of each, under the same names."""
    bodies = [path.read_bytes() for path in paths]
    references = [reference(body) for body in bodies]
    ours = {quality: _measured([_ours(body, quality) for body in bodies], references) for quality in QUALITIES}
    peer = _measured([(peer_folder / path.name).read_bytes() for path in paths], references)
    sizes = [ours[quality].bytes for quality in QUALITIES]
    same = Quality(
        peer.bytes,
        float(np.interp(peer.bytes, sizes, [ours[quality].psnr_db for quality in QUALITIES])),
        float(np.interp(peer.bytes, sizes, [ours[quality].ssim for quality in QUALITIES])),
    )
    return Compared(len(paths), ours[STORED_QUALITY], peer, same)


def reference(body: bytes) -> np.ndarray:
    """The area average of the centre square, float64, H×W×C."""
    pixels = np.asarray(Image.open(io.BytesIO(body)).convert("RGB"), dtype=np.float64)
    height, width, _ = pixels.shape
    side = min(height, width)
    top, left = (height - side) / 2, (width - side) / 2
    down, across = _areas(height, top, side), _areas(width, left, side)
    return np.einsum("ih,hwc,jw->ijc", down, pixels, across, optimize=True)


def _areas(length: int, start: float, side: int) -> np.ndarray:
    """SIZE × length: the share of each source pixel in each target pixel."""
    edges = start + np.arange(SIZE + 1) * side / SIZE
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.clip(overlap, 0, None) * SIZE / side


def _measured(stored: list[bytes], references: list[np.ndarray]) -> Quality:
    sizes, psnrs, ssims = [], [], []
    for body, wanted in zip(stored, references, strict=True):
        got = np.asarray(Image.open(io.BytesIO(body)).convert("RGB"), dtype=np.float64)
        sizes.append(len(body))
        psnrs.append(10 * np.log10(255**2 / np.mean((got - wanted) ** 2)))
        ssims.append(_ssim(got @ _LUMA, wanted @ _LUMA))
    return Quality(float(np.mean(sizes)), float(np.mean(psnrs)), float(np.mean(ssims)))


_LUMA = np.array([0.299, 0.587, 0.114])


def _ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Wang et al. 2004: Gaussian window of deviation 1.5, K = (0.01, 0.03), on luma."""

    def blurred(plane: np.ndarray) -> np.ndarray:
        return gaussian_filter(plane, 1.5, truncate=3.5)

    mean_one, mean_other = blurred(one), blurred(other)
    variance_one, variance_other = blurred(one**2) - mean_one**2, blurred(other**2) - mean_other**2
    covariance = blurred(one * other) - mean_one * mean_other
    light, contrast = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similar = (2 * mean_one * mean_other + light) * (2 * covariance + contrast)
    return float(
        np.mean(similar / ((mean_one**2 + mean_other**2 + light) * (variance_one + variance_other + contrast)))
    )


def _ours(body: bytes, quality: int) -> bytes:
    config = ImagesConfig(size=SIZE, quality=quality)
    data = decode(body, config, Filters(config.filters, {})).data
    assert data is not None
    return data
