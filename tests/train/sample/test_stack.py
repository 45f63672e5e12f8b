import numpy as np
import pytest
import torch

from cluster.errors import UserError
from tests.train.sample.conftest import SAMPLES
from train.sample.noise import SeededNoise
from train.sample.stack import Stack

CAPTIONS = [
    "a large red circle at the top left on a white background",
    "a small blue square above a large green star on a grey background",
    "a large cyan star in the centre on a black background",
]
SEEDS = [11, 12, 13]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stack(world) -> Stack:
    return Stack.open(world, SAMPLES)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = np.square(one.astype(np.float64) - other.astype(np.float64)).mean()
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


@pytest.mark.parametrize("mode", ["prior", "text_embedding", "caption"])
def test_a_picture_does_not_depend_on_what_shares_its_batch(stack, mode):
    together = stack.draw(CAPTIONS, SEEDS, mode)
    for index in range(3):
        alone = stack.draw([CAPTIONS[index]], [SEEDS[index]], mode)
        for name, pictures in together.pictures.items():
            assert psnr(pictures[index], alone.pictures[name][0]) >= 50


def test_another_seed_is_another_picture(stack):
    one, other = (stack.draw(CAPTIONS[:1], [seed]).pictures["decoder"] for seed in (1, 2))
    assert psnr(one, other) < 30


def test_each_model_draws_at_its_own_size(stack):
    drawn = stack.draw(CAPTIONS, SEEDS)
    sizes = {name: pictures.shape for name, pictures in drawn.pictures.items()}
    assert sizes == {
        "decoder": (3, 16, 16, 3),
        "upsampler_256": (3, 32, 32, 3),
        "upsampler_1024": (3, 64, 64, 3),
    }
    np.testing.assert_allclose(np.linalg.norm(drawn.z_i, axis=1), 1, rtol=1e-5)


def test_the_caption_alone_has_no_image_embedding(stack):
    assert stack.draw(CAPTIONS, SEEDS, "caption").z_i is None


def test_streams_of_noise_are_apart_by_seed_and_by_model():
    streams = [SeededNoise([seed], name, (500,), CPU)()[0] for seed in (1, 2) for name in ("decoder", "prior/0")]
    correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(4)
    assert correlation.abs().max() < 0.2


def test_a_stack_that_lacks_a_model_names_it(world):
    with pytest.raises(UserError, match="upsampler_256 are not named"):
        Stack.open({name: uri for name, uri in world.items() if name != "upsampler_256"}, SAMPLES)


def test_sizes_that_do_not_follow_each_other_are_named(world):
    with pytest.raises(UserError, match=r"set upsampler_256\.model\.low_size=16"):
        Stack.open({**world, "upsampler_256": world["upsampler_1024"]}, SAMPLES)
