import numpy as np
import pytest
from scipy.stats import binomtest

from ingest.scenes import training_scene
from train.evaluate.intervals import Proportion
from train.evaluate.probe import Probe, fit_probes, labels_of, probe_table
from train.evaluate.retrieval import retrieval


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (63, 64), (7, 200)])
def test_interval_agrees_with_scipy(correct, total):
    expected = binomtest(correct, total).proportion_ci(method="wilson")
    assert Proportion(correct, total).interval == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_retrieval_of_matched_vectors_is_perfect_and_of_random_ones_is_chance():
    generator = np.random.default_rng(0)
    image = generator.normal(size=(400, 16))
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    captions = [f"caption {index}" for index in range(400)]
    matched = retrieval(image, image, captions)
    assert matched["image_to_text"]["top1"]["accuracy"] == 1
    assert matched["text_to_image"]["top5"]["chance"] == pytest.approx(5 / 400)
    other = retrieval(image, generator.permutation(image), captions)
    assert other["image_to_text"]["top5"]["low"] <= 5 / 400 <= other["image_to_text"]["top5"]["high"]


def test_a_repeated_caption_is_right_wherever_it_stands():
    vectors = np.eye(4)
    table = retrieval(vectors, vectors[[1, 0, 2, 3]], ["a", "a", "b", "c"])
    assert table["image_to_text"]["top1"]["accuracy"] == 1
    assert table["image_to_text"]["top1"]["chance"] == pytest.approx((2 / 4 + 2 / 4 + 1 / 4 + 1 / 4) / 4)


def test_probe_reads_what_is_linear_in_the_embedding_and_nothing_else():
    scenes = [training_scene(1, index) for index in range(600)]
    backgrounds = [labels_of(scene)["background"] for scene in scenes]
    generator = np.random.default_rng(0)
    places = {name: generator.normal(size=32) for name in set(backgrounds)}
    vectors = np.stack([places[name] for name in backgrounds]) + 0.3 * generator.normal(size=(600, 32))
    probes = fit_probes(vectors[:400], scenes[:400])
    table = probe_table(probes, {"z_i": vectors[400:]}, scenes[400:])
    assert table["z_i"]["background"]["accuracy"] > 0.99
    assert table["z_i"]["shape"]["accuracy"] < 0.4


def test_probe_gives_back_its_labels():
    probe = Probe.fit(np.eye(3), ["a", "b", "c"])
    assert probe.read(np.eye(3)) == ["a", "b", "c"]
