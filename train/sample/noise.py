"""Noise that belongs to a picture: a stream of its own for each (seed, model), whatever shares the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class SeededNoise:
    """Standard normal noise, one stream a row. Drawn on the CPU, so that a device does not change the picture."""

    def __init__(self, seeds: Sequence[int], name: str, shape: tuple[int, ...], device: torch.device) -> None:
        self._generators = [torch.Generator().manual_seed(_stream(seed, name)) for seed in seeds]
        self._shape, self._device = shape, device

    def __call__(self) -> Tensor:
        """The next (len(seeds), *shape) float32."""
        rows = [torch.randn(self._shape, generator=generator) for generator in self._generators]
        return torch.stack(rows).to(self._device)


def _stream(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
