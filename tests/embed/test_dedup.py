from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.artifact import Artifact
from cluster.errors import UserError
from cluster.workshop import Workshop
from embed.cache import open_cache
from embed.config import DedupConfig
from embed.dedup import MATCHES_FILE, member, read_contamination
from embed.search import FlatSearch, unit_float32

Publish = Callable[..., str]
Make = Callable[[str, str], Workshop]
RNG = np.random.default_rng(0)


def vectors(count: int, dimension: int = 24) -> np.ndarray:
    return RNG.normal(size=(count, dimension))


def dedup(workshop: Make, training: str, sets: dict[str, tuple[str, str]], **config: Any) -> Artifact:
    out = workshop("dedup", "dedup")
    member(
        {
            "embeddings": training,
            "evaluation": {name: embeddings for name, (embeddings, _) in sets.items()},
            "evaluation_images": {name: images for name, (_, images) in sets.items()},
            "config": DedupConfig.model_validate(config).model_dump(mode="json"),
            "out": out.plain(),
        },
        lambda report: None,
    )
    return out.publish(1)


def test_range_search_finds_what_a_float64_product_finds() -> None:
    training_ND = (vectors(300, 8) / 3).astype(np.float16)
    evaluation_ED = (vectors(40, 8) / 3).astype(np.float16)
    found = FlatSearch(evaluation_ED).above(training_ND, 0.6)
    cosine_NE = _unit64(training_ND) @ _unit64(evaluation_ED).T
    near = np.abs(cosine_NE - 0.6) < 1e-6
    expected = {(row, column) for row, column in np.argwhere((cosine_NE > 0.6) & ~near).tolist()}
    assert expected
    assert (
        set(zip(found.query.tolist(), found.evaluation.tolist(), strict=True))
        - set(map(tuple, np.argwhere(near).tolist()))
        == expected
    )
    np.testing.assert_allclose(found.score, cosine_NE[found.query, found.evaluation], atol=1e-5)


def _unit64(vectors_ND: np.ndarray) -> np.ndarray:
    vectors_ND = vectors_ND.astype(np.float64)
    return vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)


def test_the_bound_keeps_the_best_and_counts_the_rest() -> None:
    evaluation_ED = np.array([[1, 0], [1, 0.1], [1, 0.2], [0, 1]], dtype=np.float16)
    found = FlatSearch(evaluation_ED).above(np.array([[0, 1], [1, 0]], dtype=np.float16), 0.9)
    kept, rank, overflow = found.bounded(2)
    assert kept.query.tolist() == [0, 1, 1]
    assert kept.evaluation.tolist() == [3, 0, 1]
    assert (rank.tolist(), overflow) == ([0, 0, 1], 1)


def test_unit_float32_has_unit_length() -> None:
    assert np.abs(np.linalg.norm(unit_float32(vectors(50).astype(np.float16)), axis=1) - 1).max() < 1e-6


def test_planted_copies_are_found_with_the_key_that_the_user_gave(
    cache: Publish, images: Publish, encode: Publish, clip: Publish, workshop: Make
) -> None:
    """Pictures 100 … 104 are the evaluation set; the training set holds two of them among others."""
    clip_uri = clip()
    training = encode("training", clip_uri, images("images", [6, 3], first=98))
    evaluation_images = images("evaluation_images", [5], first=100, lost=[4])
    evaluation = encode("evaluation", clip_uri, evaluation_images)
    artifact = dedup(workshop, training, {"held": (evaluation, evaluation_images)}, threshold=0.9999)
    matches = pq.read_table(artifact.file(MATCHES_FILE)).to_pylist()
    assert [match["evaluation_key"] for match in matches] == [
        f"http://pictures.test/{seed}.png" for seed in range(100, 104)
    ]
    training_pairs = np.concatenate([open_cache(training).table(shard, ["pair_id"]).column(0) for shard in range(2)])
    assert [match["pair_id"] for match in matches] == training_pairs[2:6].tolist()
    assert {match["rank"] for match in matches} == {0}
    (found,) = read_contamination(artifact.uri)["evaluation_sets"]
    assert (found["rows"], found["matched_rows"], found["overlap"], found["overflow"]) == (4, 4, 1.0, 0)
    assert found["interval"][1] == 1.0
    assert found["threshold_chosen"] == "by hand, dedup.threshold"


def test_an_evaluation_set_of_training_pictures_is_flagged_whole(
    images: Publish, encode: Publish, clip: Publish, workshop: Make
) -> None:
    images_uri = images("images", [5])
    training = encode("training", clip(), images_uri)
    artifact = dedup(workshop, training, {"self": (training, images_uri)}, thresholds={"self": 0.999})
    (found,) = read_contamination(artifact.uri)["evaluation_sets"]
    assert found["overlap"] == 1.0
    assert found["threshold_chosen"] == "by hand for this set"


def test_an_overflowing_query_is_still_matched(images: Publish, cache: Publish, workshop: Make) -> None:
    same_ND = np.repeat(vectors(1), 6, axis=0)
    training = cache("training", [(same_ND[:1], vectors(1))])
    evaluation = cache("evaluation", [(same_ND, vectors(6))])
    sets = {"set": (evaluation, images("evaluation_images", [6]))}
    artifact = dedup(workshop, training, sets, matches_per_query=2)
    (found,) = read_contamination(artifact.uri)["evaluation_sets"]
    assert (found["matched_rows"], found["matches"], found["overflow"], found["training_rows_matched"]) == (6, 2, 4, 1)


@pytest.mark.parametrize("rows", [0, 1])
def test_an_empty_evaluation_set_and_one_of_a_single_picture(
    images: Publish, cache: Publish, workshop: Make, rows: int
) -> None:
    training = cache("training", [(vectors(4), vectors(4))])
    evaluation = cache("evaluation", [(vectors(rows), vectors(rows))])
    artifact = dedup(workshop, training, {"set": (evaluation, images("evaluation_images", [rows]))})
    (found,) = read_contamination(artifact.uri)["evaluation_sets"]
    assert (found["rows"], found["matched_rows"]) == (rows, 0)
    assert found["overlap"] == (0.0 if rows else None)


def test_without_evaluation_sets_there_is_nothing_to_find(cache: Publish, workshop: Make) -> None:
    artifact = dedup(workshop, cache("training", [(vectors(4), vectors(4))]), {})
    assert read_contamination(artifact.uri)["evaluation_sets"] == []
    assert pq.read_table(artifact.file(MATCHES_FILE)).num_rows == 0


def test_caches_of_two_clips_are_refused(images: Publish, cache: Publish, workshop: Make) -> None:
    training = cache("training", [(vectors(4), vectors(4))])
    other = cache("other", [(vectors(4), vectors(4))], encoder="another encoder")
    with pytest.raises(UserError, match="encode both with one CLIP"):
        dedup(workshop, training, {"set": (other, images("evaluation_images", [4]))})


def test_vectors_of_two_dimensions_are_refused(images: Publish, cache: Publish, workshop: Make) -> None:
    training = cache("training", [(vectors(4), vectors(4))])
    wide = cache("wide", [(vectors(4, 32), vectors(4, 32))])
    with pytest.raises(UserError, match="32 dimensions and the training cache of 24"):
        dedup(workshop, training, {"set": (wide, images("evaluation_images", [4]))})


def test_a_threshold_for_a_set_that_is_not_there_is_refused(cache: Publish, workshop: Make) -> None:
    with pytest.raises(UserError, match="'cocoo', which is no evaluation set; there are: none"):
        dedup(workshop, cache("training", [(vectors(4), vectors(4))]), {}, thresholds={"cocoo": 0.9})
