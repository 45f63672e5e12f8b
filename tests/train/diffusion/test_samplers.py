"""Samplers against exact Gaussians and against diffusers' schedulers."""

from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UnCLIPScheduler

from train.diffusion.gaussian import Parameterization, clip_static
from train.diffusion.samplers import ddim_sample, ddpm_sample
from train.diffusion.schedule import Schedule, make_schedule, respaced, subset

SHAPE = (2, 3, 4, 4)
THEIR_NAMES = {"x_start": "sample", "eps": "epsilon", "v": "v_prediction"}
MEAN, SPREAD = 0.7, 0.4


def exact_denoiser(schedule: Schedule) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """E[x_0 | x_t] of data from N(MEAN, SPREAD²): what a perfect network answers."""

    def denoise(x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        alpha_bar = schedule.alphas_cumprod[timestep].view(-1, 1)
        gain = SPREAD**2 * alpha_bar.sqrt() / (alpha_bar * SPREAD**2 + 1 - alpha_bar)
        return MEAN + gain * (x_t - alpha_bar.sqrt() * MEAN)

    return denoise


def some_network(channels: int = 3) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Any smooth function of picture and step."""

    def denoise(x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        phase = timestep.view(-1, 1, 1, 1).to(x_t.dtype) / 1000
        answer = torch.tanh(0.6 * x_t + 0.2 * torch.sin(7 * phase) + 0.1 * x_t.flip(-1))
        return answer if channels == 3 else torch.cat([answer, torch.cos(answer * 3)], dim=1)

    return denoise


def seeded(shape: tuple[int, ...] = SHAPE) -> Callable[[], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return lambda: torch.randn(shape, generator=generator)


def test_ddim_carries_a_gaussian_onto_the_data():
    """The probability flow of Gaussian data is x_0 = mean + spread · x_T."""
    schedule = make_schedule("cosine", 1000)
    x_T = torch.linspace(-2.5, 2.5, 11, dtype=torch.float64).view(-1, 1)
    x_0 = ddim_sample(exact_denoiser(schedule), x_T, schedule, kind=Parameterization.X_START)
    torch.testing.assert_close(x_0, MEAN + SPREAD * x_T, rtol=0, atol=0.01)


@pytest.mark.parametrize("eta", [None, 1.0])
def test_ancestral_sampling_has_the_data_distribution(eta):
    schedule = make_schedule("cosine", 1000)
    generator = torch.Generator().manual_seed(0)

    def noise() -> torch.Tensor:
        return torch.randn(20_000, 1, generator=generator, dtype=torch.float64)

    kind, denoise = Parameterization.X_START, exact_denoiser(schedule)
    shorter = respaced(schedule, 250)
    if eta is None:
        x_0 = ddpm_sample(denoise, noise(), shorter, kind=kind, noise=noise)
    else:
        x_0 = ddim_sample(denoise, noise(), shorter, kind=kind, noise=noise, eta=eta)
    assert abs(x_0.mean().item() - MEAN) < 0.01
    assert abs(x_0.std().item() - SPREAD) < 0.01


@pytest.mark.parametrize("kind", Parameterization)
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_agrees_with_diffusers(kind, eta):
    theirs = DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=THEIR_NAMES[kind],
        clip_sample=True,
        timestep_spacing="leading",
    )
    theirs.set_timesteps(50)
    denoise, x_T = some_network(), seeded()()
    x, generator = x_T, torch.Generator().manual_seed(2)
    for timestep in theirs.timesteps:
        answer = denoise(x, timestep.expand(2))
        x = theirs.step(answer, timestep, x, eta=eta, generator=generator, use_clipped_model_output=True).prev_sample
    schedule = subset(make_schedule("cosine", 1000), sorted(theirs.timesteps.tolist()))
    generator = torch.Generator().manual_seed(2)
    ours = ddim_sample(
        denoise,
        x_T,
        schedule,
        kind=kind,
        eta=eta,
        noise=lambda: torch.randn(SHAPE, generator=generator),
        clip=clip_static,
    )
    # Diffusers adds noise at the last step too, of the variance between step 0 and ᾱ = 1: none.
    torch.testing.assert_close(ours, x, rtol=0, atol=2e-4)


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_ddpm_agrees_with_diffusers(variance):
    theirs = DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        variance_type=variance,
        prediction_type="epsilon",
        clip_sample=True,
        timestep_spacing="leading",
    )
    theirs.set_timesteps(100)
    learned = variance == "learned_range"
    denoise, x_T = some_network(6 if learned else 3), seeded()()
    x, generator = x_T, torch.Generator().manual_seed(2)
    for timestep in theirs.timesteps:
        x = theirs.step(denoise(x, timestep.expand(2)), timestep, x, generator=generator).prev_sample
    schedule = subset(make_schedule("linear", 1000), sorted(theirs.timesteps.tolist()))
    generator = torch.Generator().manual_seed(2)
    ours = ddpm_sample(
        denoise,
        x_T,
        schedule,
        kind=Parameterization.EPS,
        noise=lambda: torch.randn(SHAPE, generator=generator),
        learned_variance=learned,
        clip=clip_static,
    )
    torch.testing.assert_close(ours, x, rtol=0, atol=2e-4)


def test_strided_prior_sampling_agrees_with_diffusers_unclip_scheduler():
    theirs = UnCLIPScheduler(num_train_timesteps=1000, prediction_type="sample", clip_sample=False)
    theirs.set_timesteps(25)
    steps = [int(timestep) for timestep in theirs.timesteps]
    schedule = respaced(make_schedule("cosine", 1000), 25)
    assert schedule.timesteps.tolist() == steps[::-1]
    denoise, x_T = some_network(), seeded()()
    x, generator = x_T, torch.Generator().manual_seed(2)
    for index, timestep in enumerate(steps):
        following = steps[index + 1] if index + 1 < len(steps) else None
        answer = denoise(x, torch.full((2,), timestep))
        x = theirs.step(answer, timestep, x, prev_timestep=following, generator=generator).prev_sample
    generator = torch.Generator().manual_seed(2)
    noise = lambda: torch.randn(SHAPE, generator=generator)  # noqa: E731
    ours = ddpm_sample(denoise, x_T, schedule, kind=Parameterization.X_START, noise=noise)
    torch.testing.assert_close(ours, x, rtol=0, atol=2e-4)


def test_eta_without_noise_says_what_to_pass():
    with pytest.raises(ValueError, match="pass a noise source"):
        ddim_sample(some_network(), torch.zeros(SHAPE), SCHEDULE, kind=Parameterization.EPS, eta=0.5)


SCHEDULE = make_schedule("linear", 10)
