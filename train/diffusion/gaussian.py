"""The forward process, its posterior, and what a network may predict: x_start, eps or v.

    x_t = √ᾱ x_0 + √(1−ᾱ) ε            (DDPM eq. 4)
    v   = √ᾱ ε   − √(1−ᾱ) x_0          (Salimans & Ho 2022, §4)

All three name the same point: given x_t, each is an affine function of each other. So classifier-free guidance
gives the same picture in whichever of them the network speaks.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

from train.diffusion.schedule import Schedule, at


class Parameterization(StrEnum):
    X_START = "x_start"
    EPS = "eps"
    V = "v"


def q_sample(schedule: Schedule, x_start: Tensor, step_B: Tensor, noise: Tensor) -> Tensor:
    """x_t of x_0 (DDPM eq. 4)."""
    alpha_bar = schedule.alphas_cumprod
    return at(alpha_bar.sqrt(), step_B, x_start) * x_start + at((1 - alpha_bar).sqrt(), step_B, x_start) * noise


def q_posterior(schedule: Schedule, x_start: Tensor, x_t: Tensor, step_B: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance of q(x_{t−1} | x_t, x_0) (DDPM eqs. 6 and 7)."""
    of_x_start, of_x_t = schedule.posterior_coefficients
    mean = at(of_x_start, step_B, x_t) * x_start + at(of_x_t, step_B, x_t) * x_t
    return mean, at(schedule.posterior_log_variance, step_B, x_t)


def target(kind: Parameterization, schedule: Schedule, x_start: Tensor, step_B: Tensor, noise: Tensor) -> Tensor:
    """What a network of this kind should answer."""
    if kind is Parameterization.X_START:
        return x_start
    if kind is Parameterization.EPS:
        return noise
    alpha_bar = schedule.alphas_cumprod
    return at(alpha_bar.sqrt(), step_B, x_start) * noise - at((1 - alpha_bar).sqrt(), step_B, x_start) * x_start


def to_x_start(kind: Parameterization, schedule: Schedule, output: Tensor, x_t: Tensor, step_B: Tensor) -> Tensor:
    """The x_0 that a network's answer at x_t implies."""
    if kind is Parameterization.X_START:
        return output
    alpha_bar = schedule.alphas_cumprod
    if kind is Parameterization.EPS:
        noise_share = at((1 / alpha_bar - 1).sqrt(), step_B, x_t)
        return at(alpha_bar.rsqrt(), step_B, x_t) * x_t - noise_share * output
    return at(alpha_bar.sqrt(), step_B, x_t) * x_t - at((1 - alpha_bar).sqrt(), step_B, x_t) * output


def to_eps(schedule: Schedule, x_start: Tensor, x_t: Tensor, step_B: Tensor) -> Tensor:
    """The noise that turns this x_0 into x_t."""
    alpha_bar = schedule.alphas_cumprod
    return (x_t - at(alpha_bar.sqrt(), step_B, x_t) * x_start) * at((1 - alpha_bar).rsqrt(), step_B, x_t)


def guide(conditional: Tensor, unconditional: Tensor, *, scale: float) -> Tensor:
    """Classifier-free guidance (CFG eq. 6, written so that scale 1 is the conditional model)."""
    return unconditional + scale * (conditional - unconditional)


def clip_static(x_start: Tensor) -> Tensor:
    """Pixels live in [−1, 1]; a prediction outside would drag the whole chain with it."""
    return torch.clamp(x_start, -1, 1)
