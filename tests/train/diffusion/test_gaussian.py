"""The forward process against closed forms in float64."""

import itertools

import pytest
import torch

from train.diffusion.gaussian import Parameterization, guide, q_posterior, q_sample, target, to_eps, to_x_start
from train.diffusion.schedule import make_schedule, respaced

SCHEDULES = [make_schedule("cosine", 1000), make_schedule("linear", 1000), respaced(make_schedule("cosine", 1000), 64)]


def rows(count: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, 2, 2)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior_is_bayes_rule_on_the_chain(schedule):
    """q(x_{t−1}|x_t,x_0) ∝ q(x_t|x_{t−1}) q(x_{t−1}|x_0): precisions add, means weigh by precision."""
    x_start, x_t = rows()
    step = torch.tensor([1, 2, 10, 20, 40, 50, 63])
    mean, log_variance = q_posterior(schedule, x_start, x_t, step)
    beta, previous = (table[step].view(-1, 1, 1, 1) for table in (schedule.betas, schedule.alphas_cumprod_prev))
    likelihood_precision, prior_precision = (1 - beta) / beta, 1 / (1 - previous)
    precision = likelihood_precision + prior_precision
    expected = (
        likelihood_precision * x_t / (1 - beta).sqrt() + prior_precision * previous.sqrt() * x_start
    ) / precision
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_variance.exp(), 1 / precision, rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_step_at_a_time_reaches_the_marginal(schedule):
    """x_t = √(1−β) x_{t−1} + √β ε step by step has q_sample's mean and variance."""
    mean, variance = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for step, beta in enumerate(schedule.betas):
        mean, variance = (1 - beta).sqrt() * mean, (1 - beta) * variance + beta
        at_step = torch.tensor([step])
        one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
        torch.testing.assert_close(q_sample(schedule, one, at_step, zero)[0], mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(q_sample(schedule, zero, at_step, one)[0].square(), variance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", Parameterization)
def test_every_parameterisation_gives_back_x_start_and_eps(kind):
    schedule = SCHEDULES[0]
    x_start, noise = rows()
    step = torch.tensor([0, 1, 100, 500, 800, 990, 999])
    x_t = q_sample(schedule, x_start, step, noise)
    found = to_x_start(kind, schedule, target(kind, schedule, x_start, step, noise), x_t, step)
    torch.testing.assert_close(found, x_start, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(to_eps(schedule, x_start, x_t, step), noise, rtol=1e-6, atol=1e-6)


def test_guidance_is_the_same_in_every_parameterisation():
    schedule = SCHEDULES[0]
    conditional, unconditional = rows()
    step = torch.full((7,), 400)
    x_t = rows()[1]

    def as_output(kind: Parameterization, x_start: torch.Tensor) -> torch.Tensor:
        return target(kind, schedule, x_start, step, to_eps(schedule, x_start, x_t, step))

    guided = [
        to_x_start(
            kind,
            schedule,
            guide(as_output(kind, conditional), as_output(kind, unconditional), scale=3.0),
            x_t,
            step,
        )
        for kind in Parameterization
    ]
    for one, other in itertools.pairwise(guided):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_respacing_keeps_the_signal_and_both_ends():
    schedule = SCHEDULES[0]
    shorter = respaced(schedule, 27)
    assert shorter.timesteps[0] == 0 and shorter.timesteps[-1] == 999 and len(shorter) == 27
    torch.testing.assert_close(shorter.alphas_cumprod, schedule.alphas_cumprod[shorter.timesteps], rtol=1e-9, atol=0)


def test_respacing_to_more_steps_than_there_are_says_what_is_allowed():
    with pytest.raises(ValueError, match="choose between 1 and the schedule's 10"):
        respaced(make_schedule("cosine", 10), 11)
