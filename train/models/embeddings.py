"""Sinusoidal embedding of a timestep (DDPM appendix B)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def timestep_embedding(timestep_B: Tensor, width: int, *, max_period: float = 10_000.0) -> Tensor:
    """(B, width) float32: cosines, then sines, of `width // 2` geometric frequencies from 1 to 1/max_period."""
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=timestep_B.device) / half)
    angles = timestep_B.float()[:, None] * frequencies
    embedded = torch.cat([angles.cos(), angles.sin()], dim=1)
    return torch.nn.functional.pad(embedded, (0, width % 2))
