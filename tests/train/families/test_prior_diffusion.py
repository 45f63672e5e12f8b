import numpy as np
import pytest
import torch

from train.draws import Draws
from train.families import prior_diffusion
from train.families.config import PriorModelConfig, SamplerConfig
from train.families.prior_diffusion import DiffusionPrior, sample_prior
from train.family import Facts
from train.sample.noise import SeededNoise

FACTS = Facts(
    dimension=8,
    text_width=12,
    context_length=6,
    vocabulary_size=50,
    embedding_scale=2.5,
    embedding_mean=tuple(np.linspace(-0.2, 0.3, 8).tolist()),
)
CPU = torch.device("cpu")


def some_prior() -> DiffusionPrior:
    torch.manual_seed(0)
    config = PriorModelConfig(width=32, depth=2, heads=4, text="clip_hidden")
    return prior_diffusion.build(config, FACTS).eval()


def some_batch(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 40, (count, 6), generator=generator)
    tokens[:, 4], tokens[:, 5] = 49, 0
    z_i, z_t = (torch.nn.functional.normalize(torch.randn(count, 8, generator=generator), dim=1) for _ in range(2))
    hidden = torch.randn(count, 6, 12, generator=generator)
    return {"tokens": tokens, "text_hidden": hidden, "image_embedding": z_i, "text_embedding": z_t}


def test_loss_is_the_error_against_the_standardised_embedding():
    prior, batch = some_prior(), some_batch(16)
    with torch.no_grad():
        prior.answer.weight.zero_()
        prior.answer.bias.zero_()
    loss, _ = prior_diffusion.loss(prior, batch, Draws(0, 0, np.arange(16)))
    mean = torch.tensor(FACTS.embedding_mean)
    expected = ((batch["image_embedding"] - mean) * 2.5).square().mean()
    torch.testing.assert_close(loss, expected)


def test_dropped_text_leaves_nothing_of_the_caption():
    prior, batch, other = some_prior(), some_batch(4), some_batch(8)
    z, step, dropped = torch.randn(4, 8), torch.full((4,), 300), torch.ones(4, dtype=torch.bool)
    answers = [
        prior(each["tokens"][-4:], each["text_hidden"][-4:], each["text_embedding"][-4:], z, step, dropped)
        for each in (batch, other)
    ]
    torch.testing.assert_close(answers[0], answers[1])


def test_cached_prefix_gives_the_same_answer_as_the_whole_sequence():
    prior, batch = some_prior(), some_batch(4)
    z, step = torch.randn(4, 8), torch.tensor([0, 10, 500, 999])
    conditions = (batch["tokens"], batch["text_hidden"], batch["text_embedding"])
    whole = prior(*conditions, z, step)
    cached = prior.continued(prior.past(prior.prefix(*conditions)), z, step)
    torch.testing.assert_close(cached, whole, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_more_candidates_never_fit_worse(guidance_scale, method):
    prior, batch = some_prior(), some_batch(5)
    fits = []
    for candidates in (1, 2, 6):
        z_i = sample_prior(
            prior,
            SamplerConfig(steps=8, method=method, guidance_scale=guidance_scale),
            tokens_BT=batch["tokens"],
            hidden_BTW=batch["text_hidden"],
            text_embedding_BD=batch["text_embedding"],
            noises=[SeededNoise(range(5), f"prior/{index}", (8,), CPU) for index in range(candidates)],
        )
        torch.testing.assert_close(z_i.norm(dim=1), torch.ones(5))
        fits.append((z_i * batch["text_embedding"]).sum(dim=1))
    assert (fits[1] >= fits[0]).all() and (fits[2] >= fits[1]).all()
