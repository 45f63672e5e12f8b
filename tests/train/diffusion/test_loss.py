"""The learned variance and L_hybrid (iDDPM)."""

import math

import torch

from train.diffusion.gaussian import Parameterization, q_posterior, q_sample
from train.diffusion.loss import (
    discretized_gaussian_log_likelihood,
    hybrid_loss,
    learned_log_variance,
    normal_kl,
    simple_loss,
    variational_bound,
)
from train.diffusion.schedule import make_schedule

SCHEDULE = make_schedule("cosine", 1000)


def test_learned_variance_spans_the_two_bounds():
    step = torch.tensor([5, 500, 900])
    low = learned_log_variance(SCHEDULE, -torch.ones(3, 1), step)
    high = learned_log_variance(SCHEDULE, torch.ones(3, 1), step)
    torch.testing.assert_close(low[:, 0].double(), SCHEDULE.posterior_log_variance[step], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(high[:, 0].double(), SCHEDULE.betas.log()[step], rtol=1e-5, atol=1e-5)


def test_kl_agrees_with_torch_distributions():
    a, b = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(a[0], (0.5 * a[1]).exp()), torch.distributions.Normal(b[0], (0.5 * b[1]).exp())
    )
    torch.testing.assert_close(normal_kl(a[0], a[1], b[0], b[1]), expected)


def test_likelihoods_of_all_256_levels_sum_to_one():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mean, log_variance = torch.full((256,), 0.3, dtype=torch.float64), torch.full((256,), -3.0, dtype=torch.float64)
    total = discretized_gaussian_log_likelihood(levels, mean, log_variance).exp().sum().item()
    assert math.isclose(total, 1, abs_tol=1e-9)


def test_bound_is_zero_where_the_network_is_right():
    x_start, noise = torch.rand(4, 3, 4, 4) * 2 - 1, torch.randn(4, 3, 4, 4)
    step = torch.tensor([3, 100, 500, 999])
    bits = variational_bound(
        Parameterization.X_START, SCHEDULE, x_start, -torch.ones_like(x_start), x_start, step, noise
    )
    torch.testing.assert_close(bits, torch.zeros(4), rtol=0, atol=1e-5)


def test_bound_is_the_kl_of_the_two_posteriors():
    x_start, guess, noise = (torch.randn(2, 1, 2, 2) for _ in range(3))
    step = torch.tensor([50, 700])
    x_t = q_sample(SCHEDULE, x_start, step, noise)
    (true_mean, log_variance), (mean, _) = (q_posterior(SCHEDULE, x, x_t, step) for x in (x_start, guess))
    expected = ((true_mean - mean).square() / log_variance.exp() / 2).flatten(1).mean(1) / math.log(2)
    bits = variational_bound(Parameterization.X_START, SCHEDULE, guess, -torch.ones_like(guess), x_start, step, noise)
    torch.testing.assert_close(bits, expected, rtol=1e-4, atol=1e-6)


def test_variance_term_teaches_the_variance_only():
    x_start, noise = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    step = torch.tensor([10, 800])
    output = torch.randn(2, 6, 4, 4, requires_grad=True)
    loss, metrics = hybrid_loss(Parameterization.EPS, SCHEDULE, output, x_start, step, noise)
    loss.backward()
    assert output.grad is not None
    expected = 2 * (output.detach()[:, :3] - noise) / noise.numel()
    torch.testing.assert_close(output.grad[:, :3], expected)
    assert output.grad[:, 3:].abs().max() > 0
    torch.testing.assert_close(loss.detach(), metrics["simple"] + metrics["vlb"])


def test_signal_to_noise_weights_are_cut_at_one_and_at_the_cap():
    step = torch.tensor([0, 300, 450, 900])
    x_start, noise = torch.zeros(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    snr = SCHEDULE.alphas_cumprod[step] / (1 - SCHEDULE.alphas_cumprod[step])
    assert snr[0] > 5 > snr[1] > 1 > snr[3]
    loss = simple_loss(
        Parameterization.X_START, SCHEDULE, torch.ones_like(x_start), x_start, step, noise, max_snr_weight=5.0
    )
    torch.testing.assert_close(loss, (5 + snr[1] + snr[2].clamp(min=1) + 1).float() / 4)
