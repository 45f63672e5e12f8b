"""Samplers: DDPM ancestral (DDPM algorithm 2, iDDPM with learned variance) and DDIM with η (DDIM eq. 12).

A sampler asks `denoise(x_t, timestep_B)` for the network's raw answer (guidance is inside it) and `noise()` for
standard normal noise of x_T's shape. Noise comes from outside so that a picture's noise can depend on its own
seed alone, whatever shares its batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from train.diffusion.gaussian import Parameterization, q_posterior, to_eps, to_x_start
from train.diffusion.loss import learned_log_variance
from train.diffusion.schedule import Schedule, at

Denoise = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[], Tensor]
Clip = Callable[[Tensor], Tensor]


@torch.no_grad()
def ddpm_sample(
    denoise: Denoise,
    x_T: Tensor,
    schedule: Schedule,
    *,
    kind: Parameterization,
    noise: Noise,
    learned_variance: bool = False,
    clip: Clip | None = None,
) -> Tensor:
    """x_0 by ancestral sampling. The variance is β̃_t, or learned: the second half of the answer's channels."""
    x = x_T
    for step in reversed(range(len(schedule))):
        step_B = torch.full((x.shape[0],), step, device=x.device)
        output = denoise(x, schedule.timesteps.to(x.device)[step_B]).to(x.dtype)
        if learned_variance:
            output, raw_variance = output.chunk(2, dim=1)
        x_start = to_x_start(kind, schedule, output, x, step_B)
        mean, log_variance = q_posterior(schedule, clip(x_start) if clip else x_start, x, step_B)
        if learned_variance:
            log_variance = learned_log_variance(schedule, raw_variance, step_B)
        x = mean + torch.exp(0.5 * log_variance) * noise() if step > 0 else mean
    return x


@torch.no_grad()
def ddim_sample(
    denoise: Denoise,
    x_T: Tensor,
    schedule: Schedule,
    *,
    kind: Parameterization,
    noise: Noise | None = None,
    eta: float = 0.0,
    clip: Clip | None = None,
) -> Tensor:
    """x_0 by DDIM: deterministic in x_T at η = 0, DDPM's variance β̃_t at η = 1 (DDIM eqs. 12 and 16)."""
    if eta > 0 and noise is None:
        raise ValueError(f"eta = {eta} draws noise at every step: pass a noise source, or eta = 0")
    previous, sigma = schedule.alphas_cumprod_prev, eta * schedule.posterior_variance.sqrt()
    x = x_T
    for step in reversed(range(len(schedule))):
        step_B = torch.full((x.shape[0],), step, device=x.device)
        output = denoise(x, schedule.timesteps.to(x.device)[step_B]).to(x.dtype)
        x_start = to_x_start(kind, schedule, output, x, step_B)
        if clip:
            x_start = clip(x_start)
        eps = to_eps(schedule, x_start, x, step_B)
        direction = (1 - previous - sigma.square()).clamp(min=0).sqrt()
        x = at(previous.sqrt(), step_B, x) * x_start + at(direction, step_B, x) * eps
        if noise is not None and eta > 0 and step > 0:
            x = x + at(sigma, step_B, x) * noise()
    return x
