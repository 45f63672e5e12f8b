"""The oracle on pictures that the grammar itself drew, at every size of the cascade."""

import numpy as np
import pytest
from PIL import Image

from ingest.scenes import draw, heldout_pair_scene, training_scene
from train.evaluate.accuracy import accuracy, scenes_of
from train.evaluate.oracle import ATTRIBUTES, read_picture

SCENES = [training_scene(5, index) for index in range(160)] + [heldout_pair_scene(5, index) for index in range(80)]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [draw(scene, 256) for scene in SCENES]


@pytest.mark.parametrize("size", [256, 64, 16])
def test_reads_what_was_drawn(pictures, size):
    reduced = [np.asarray(picture.resize((size, size), Image.Resampling.BOX)) for picture in pictures]
    table = accuracy(reduced, SCENES)
    assert all(table[name]["accuracy"] >= 0.99 for name in ATTRIBUTES)
    assert all(table[name]["chance"] < 0.3 for name in ATTRIBUTES)


def test_reads_through_noise(pictures):
    generator = np.random.default_rng(0)
    noisy = [
        np.clip(np.asarray(p.resize((64, 64), Image.Resampling.BOX)) + generator.normal(0, 8, (64, 64, 3)), 0, 255)
        for p in pictures
    ]
    table = accuracy([picture.astype(np.uint8) for picture in noisy], SCENES)
    assert table["background"]["accuracy"] >= 0.99 and table["shape_colour"]["accuracy"] >= 0.97


def test_an_empty_picture_has_a_background_and_no_shape():
    reading = read_picture(np.full((16, 16, 3), (40, 165, 70), dtype=np.uint8))
    assert (reading.background, reading.shape_colour, reading.position) == ("green", None, None)


def test_pictures_of_other_captions_score_chance(pictures):
    small = [np.asarray(picture.resize((16, 16), Image.Resampling.BOX)) for picture in pictures]
    shuffled = small[1:] + small[:1]
    table = accuracy(shuffled, SCENES)
    for name in ATTRIBUTES:
        assert table[name]["low"] - 0.05 <= table[name]["chance"] <= table[name]["high"] + 0.05


def test_captions_of_other_data_have_no_scenes():
    assert scenes_of(["grinning face"]) is None
