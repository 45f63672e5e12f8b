"""Training losses: L_simple (DDPM eq. 14) and L_hybrid with a learned variance (iDDPM §3.1).

With a learned variance the network has twice the output channels; the second half is v ∈ about [−1, 1] with

    log σ²_t = f · log β_t + (1 − f) · log β̃_t,   f = (v + 1)/2          (iDDPM eq. 15)

    L_hybrid = L_simple + λ L_vlb,   λ = 0.001; here λ L_vlb is T/1000 times one random term, as iDDPM's code has it
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from train.diffusion.gaussian import Parameterization, q_posterior, q_sample, target, to_x_start
from train.diffusion.schedule import Schedule, at

PIXEL_BIN = 1 / 127.5  # the width of one of 256 levels in [−1, 1]


def learned_log_variance(schedule: Schedule, raw: Tensor, step_B: Tensor) -> Tensor:
    """log σ²_t between log β̃_t and log β_t (iDDPM eq. 15)."""
    share = (raw.float() + 1) / 2
    return share * at(schedule.betas.log(), step_B, raw) + (1 - share) * at(
        schedule.posterior_log_variance, step_B, raw
    )


def normal_kl(mean_a: Tensor, log_variance_a: Tensor, mean_b: Tensor, log_variance_b: Tensor) -> Tensor:
    """KL(a ‖ b) of diagonal Gaussians, an entry each, in nats."""
    spread = torch.exp(log_variance_a - log_variance_b)
    offset = (mean_a - mean_b).square() * torch.exp(-log_variance_b)
    return 0.5 * (log_variance_b - log_variance_a + spread + offset - 1)


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the mass that N(mean, σ²) gives to x's 1/255-wide bin, the outermost bins open (DDPM eq. 13)."""
    inverse_sigma = torch.exp(-0.5 * log_variance)
    upper = _standard_normal_cdf((x - mean + PIXEL_BIN / 2) * inverse_sigma)
    lower = _standard_normal_cdf((x - mean - PIXEL_BIN / 2) * inverse_sigma)
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


def simple_loss(
    kind: Parameterization,
    schedule: Schedule,
    output: Tensor,
    x_start: Tensor,
    step_B: Tensor,
    noise: Tensor,
    *,
    max_snr_weight: float = 1.0,
) -> Tensor:
    """L_simple: mean squared error in the network's own parameterisation. Scalar, float32.

    With x_start as the target, errors at low noise are small and their details are learned last. `max_snr_weight`
    above 1 weighs each row by its signal-to-noise ratio between 1 and that: the truncated SNR of Salimans & Ho (2022,
    §4) with the cap of Hang et al. (2023).
    """
    expected = target(kind, schedule, x_start, step_B, noise)
    error_B = (output.float() - expected.float()).square().flatten(1).mean(dim=1)
    if max_snr_weight > 1:
        snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
        error_B = error_B * at(snr.clamp(1, max_snr_weight), step_B, error_B)
    return error_B.mean()


def hybrid_loss(
    kind: Parameterization,
    schedule: Schedule,
    output_2C: Tensor,
    x_start: Tensor,
    step_B: Tensor,
    noise: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_hybrid of a network with learned variance (iDDPM eq. 16); L_simple and L_vlb apart as metrics.

    The mean is taken out of L_vlb's gradient: that term teaches the variance only.
    """
    output, raw_variance = output_2C.chunk(2, dim=1)
    simple = simple_loss(kind, schedule, output, x_start, step_B, noise)
    bits = variational_bound(kind, schedule, output.detach(), raw_variance, x_start, step_B, noise)
    vlb = bits.mean() * (len(schedule) / 1000)
    return simple + vlb, {"simple": simple.detach(), "vlb": vlb.detach()}


def variational_bound(
    kind: Parameterization,
    schedule: Schedule,
    output: Tensor,
    raw_variance: Tensor,
    x_start: Tensor,
    step_B: Tensor,
    noise: Tensor,
) -> Tensor:
    """One term of the bound for each row, in bits a dimension: L_{t−1}, or L_0 at the first step (iDDPM eqs. 4–7)."""
    x_start, output = x_start.float(), output.float()
    x_t = q_sample(schedule, x_start, step_B, noise)
    true_mean, true_log_variance = q_posterior(schedule, x_start, x_t, step_B)
    mean, _ = q_posterior(schedule, to_x_start(kind, schedule, output, x_t, step_B), x_t, step_B)
    log_variance = learned_log_variance(schedule, raw_variance, step_B)
    kl = normal_kl(true_mean, true_log_variance, mean, log_variance).flatten(1).mean(1)
    likelihood = discretized_gaussian_log_likelihood(x_start, mean, log_variance).flatten(1).mean(1)
    return torch.where(step_B == 0, -likelihood, kl) / math.log(2)


def _standard_normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))
