"""Noise schedules and their tables (DDPM §2; iDDPM §3.2 and §4), in float64.

    q(x_t | x_0) = N(√ᾱ_t · x_0, (1 − ᾱ_t) I)          ᾱ_t = alphas_cumprod[t], t = 0 … T−1

A `Schedule` may be a strided subset of a longer one (`respaced`): it then has fewer steps, betas that give
the same ᾱ at the steps kept, and in `timesteps` the number that the *network* knows each step by. Functions of
this package index tables with the step's place in the schedule, networks are called with `timesteps[place]`.

The tables stay float64: at the cosine schedule's end 1 − ᾱ and ᾱ differ from 1 and 0 by less than float32 resolves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import torch
from torch import Tensor


class NoiseSchedule(StrEnum):
    COSINE = "cosine"
    LINEAR = "linear"


def cosine_betas(timesteps: int, *, offset: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """ᾱ(u) = cos²((u + s)/(1 + s) · π/2), β_t = 1 − ᾱ((t+1)/T)/ᾱ(t/T), at most 0.999 (iDDPM eq. 17)."""
    u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    alpha_bar = torch.cos((u + offset) / (1 + offset) * math.pi / 2).square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta)


def linear_betas(timesteps: int) -> Tensor:
    """DDPM's 1e-4 … 0.02 for 1,000 steps, scaled so that another number of steps destroys the same signal (ADM)."""
    scale = 1000 / timesteps
    return torch.linspace(scale * 1e-4, min(scale * 0.02, 0.999), timesteps, dtype=torch.float64)


@dataclass(frozen=True)
class Schedule:
    """Tables of one schedule; every tensor has one float64 entry a step."""

    betas: Tensor
    timesteps: Tensor  # int64: what the network calls each step
    training_timesteps: int

    def __len__(self) -> int:
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        return torch.cumprod(1 - self.betas, dim=0)

    @cached_property
    def alphas_cumprod_prev(self) -> Tensor:
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])

    @cached_property
    def posterior_variance(self) -> Tensor:
        """β̃_t = (1 − ᾱ_{t−1})/(1 − ᾱ_t) · β_t (DDPM eq. 7); zero at the first step."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance(self) -> Tensor:
        """log β̃_t, with the second step's value in the first's place, where β̃ is zero (iDDPM's code)."""
        if len(self) == 1:
            return self.betas.log()
        return torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]]).log()

    @cached_property
    def posterior_coefficients(self) -> tuple[Tensor, Tensor]:
        """Of x_0 and of x_t in the posterior's mean (DDPM eq. 7)."""
        of_x_start = self.betas * self.alphas_cumprod_prev.sqrt() / (1 - self.alphas_cumprod)
        of_x_t = (1 - self.alphas_cumprod_prev) * (1 - self.betas).sqrt() / (1 - self.alphas_cumprod)
        return of_x_start, of_x_t


def make_schedule(kind: NoiseSchedule | str, timesteps: int) -> Schedule:
    betas = {NoiseSchedule.COSINE: cosine_betas, NoiseSchedule.LINEAR: linear_betas}[NoiseSchedule(kind)](timesteps)
    return Schedule(betas, torch.arange(timesteps), timesteps)


def respaced(schedule: Schedule, steps: int) -> Schedule:
    """`steps` evenly strided steps of `schedule`, the first and the last among them (iDDPM §4)."""
    if not 1 <= steps <= len(schedule):
        raise ValueError(f"sampling steps = {steps}: choose between 1 and the schedule's {len(schedule)}")
    last = len(schedule) - 1
    return subset(schedule, [last] if steps == 1 else [round(i * last / (steps - 1)) for i in range(steps)])


def subset(schedule: Schedule, kept: Sequence[int]) -> Schedule:
    """The schedule that visits only these steps: its betas give the same ᾱ there (iDDPM eq. 19)."""
    index = torch.tensor(kept)
    alphas_cumprod = schedule.alphas_cumprod[index]
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    return Schedule(1 - alphas_cumprod / previous, schedule.timesteps[index], schedule.training_timesteps)


def at(table: Tensor, step_B: Tensor, like: Tensor) -> Tensor:
    """The table's entry of each row, float32 (or `like`'s wider type), shaped to multiply `like`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    entries_B = table.to(step_B.device)[step_B].to(dtype=dtype, device=like.device)
    return entries_B.reshape(-1, *[1] * (like.ndim - 1))
