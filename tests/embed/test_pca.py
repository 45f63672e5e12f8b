import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.artifact import Artifact
from cluster.errors import UserError
from cluster.workshop import Workshop
from embed import view
from embed.cache import open_cache
from embed.config import PcaConfig, ViewConfig
from embed.moments import Moments, merge
from embed.pca import COMPONENTS_FILE, STATISTICS_FILE, PcaCodec, member

Publish = Callable[..., str]
Make = Callable[[str, str], Workshop]
DIMENSION = 12
RNG = np.random.default_rng(0)
SPECTRUM = 0.6 ** np.arange(DIMENSION)
BASIS = np.linalg.qr(RNG.normal(size=(DIMENSION, DIMENSION)))[0]


def shard(count: int) -> tuple[np.ndarray, np.ndarray]:
    image_ND = RNG.normal(size=(count, DIMENSION)) * SPECTRUM @ BASIS + 0.3
    return image_ND, image_ND + RNG.normal(size=(count, DIMENSION)) * 0.2


SHARDS = [shard(count) for count in (150, 0, 80, 170)]


def pca(cache: Publish, workshop: Make, **config: Any) -> tuple[Artifact, np.ndarray]:
    """The artifact, and the training rows (float64) that it was computed from."""
    embeddings = cache("embeddings", SHARDS)
    out = workshop("view", "view")
    settings = ViewConfig(validation_fraction=0.2).model_dump(mode="json")
    view.member({"embeddings": embeddings, "dedup": None, "config": settings, "out": out.plain()}, lambda report: None)
    view_artifact = out.publish(len(SHARDS))
    out = workshop("pca", "pca")
    settings = PcaConfig.model_validate(config).model_dump(mode="json")
    payload = {"embeddings": embeddings, "view": view_artifact.uri, "config": settings, "out": out.plain()}
    member(payload, lambda report: None)
    opened = open_cache(embeddings)
    rows = [
        opened.vectors(index, "image_embedding")[view.training_rows(view_artifact, index)]
        for index in range(len(SHARDS))
    ]
    return out.publish(1), np.concatenate(rows).astype(np.float64)


def statistics_of(artifact: Artifact) -> dict[str, Any]:
    return dict(json.loads(artifact.file(STATISTICS_FILE).read_bytes()))


def test_spectrum_and_components_are_those_of_a_float64_svd(cache: Publish, workshop: Make) -> None:
    artifact, x_ND = pca(cache, workshop)
    table, statistics = pq.read_table(artifact.file(COMPONENTS_FILE)), statistics_of(artifact)
    assert 250 < len(x_ND) < 400, "some rows are in validation"
    assert statistics["count"] == len(x_ND)
    centred_ND = x_ND - x_ND.mean(axis=0)
    _, singular_D, vector_DD = np.linalg.svd(centred_ND, full_matrices=False)
    eigenvalue_D = singular_D**2 / len(x_ND)
    np.testing.assert_allclose(table.column("eigenvalue").to_numpy(), eigenvalue_D, atol=1e-12 * eigenvalue_D[0])
    ours_DD = np.array(table.column("vector").to_pylist())
    np.testing.assert_allclose(np.abs((ours_DD * vector_DD).sum(axis=1)), 1.0, atol=1e-8)
    np.testing.assert_allclose(statistics["mean"], x_ND.mean(axis=0), atol=1e-12)
    assert statistics["scale"] * centred_ND.std() == pytest.approx(1.0, rel=1e-3)
    np.testing.assert_allclose((statistics["scale"] * centred_ND).var(axis=0).mean(), 1.0, rtol=1e-9)


def test_the_fewest_components_that_explain_the_share_are_kept(cache: Publish, workshop: Make) -> None:
    artifact, _ = pca(cache, workshop, share=0.9)
    share_D = pq.read_table(artifact.file(COMPONENTS_FILE)).column("explained_share").to_numpy()
    kept = statistics_of(artifact)["kept"]
    assert share_D[:kept].sum() >= 0.9 > share_D[: kept - 1].sum()
    assert share_D.sum() == pytest.approx(1.0)


def test_signs_are_fixed_by_the_largest_entry(cache: Publish, workshop: Make) -> None:
    artifact, _ = pca(cache, workshop)
    vector_DD = np.array(pq.read_table(artifact.file(COMPONENTS_FILE)).column("vector").to_pylist())
    assert (vector_DD[np.arange(DIMENSION), np.abs(vector_DD).argmax(axis=1)] > 0).all()


def test_ranges_are_quantiles_of_the_projections_and_the_clipped_share_is_told(cache: Publish, workshop: Make) -> None:
    artifact, x_ND = pca(cache, workshop, components=4, range_quantiles=(0.05, 0.95))
    table, statistics = pq.read_table(artifact.file(COMPONENTS_FILE)), statistics_of(artifact)
    vector_KD = np.array(table.column("vector").to_pylist())[:4]
    projections_NK = (x_ND - x_ND.mean(axis=0)) @ vector_KD.T
    for name, quantile in (("low", 0.05), ("high", 0.95)):
        values = table.column(name).to_pylist()
        np.testing.assert_allclose(values[:4], np.quantile(projections_NK, quantile, axis=0), atol=1e-6)
        assert values[4:] == [None] * (DIMENSION - 4)
    assert statistics["clipped_share"] == pytest.approx(0.1, abs=0.01)


def test_dot_quantiles_are_percentiles_of_the_cosine_of_a_pair(cache: Publish, workshop: Make) -> None:
    artifact, _ = pca(cache, workshop)
    quantiles = statistics_of(artifact)["dot_quantiles"]
    assert len(quantiles) == 101
    assert quantiles == sorted(quantiles)
    assert -1.0 <= quantiles[0] < quantiles[50] < quantiles[-1] <= 1.001


def test_a_sample_is_drawn_when_there_are_more_rows(cache: Publish, workshop: Make) -> None:
    artifact, x_ND = pca(cache, workshop, sample_rows=100)
    assert 60 < statistics_of(artifact)["sampled_rows"] < 140
    assert statistics_of(artifact)["count"] == len(x_ND)


def test_a_second_computation_has_the_same_bytes(cache: Publish, workshop: Make) -> None:
    one, _ = pca(cache, workshop)
    other, _ = pca(lambda name, shards: cache(f"{name}2", shards), lambda name, kind: workshop(f"{name}2", kind))
    assert one.content_digest == other.content_digest


def test_moments_are_merged_in_groups_to_the_sums_of_all_rows() -> None:
    parts = [RNG.normal(size=(count, 5)) for count in (10, 0, 7, 3, 20)]
    moments = merge((Moments.of(part) for part in parts), 5, group=2)
    all_ND = np.concatenate(parts)
    assert moments.count == len(all_ND)
    np.testing.assert_allclose(moments.covariance(), np.cov(all_ND.T, bias=True), atol=1e-14)


def test_more_components_than_dimensions_are_refused(cache: Publish, workshop: Make) -> None:
    with pytest.raises(UserError, match=r"pca\.components is 99, but the embeddings have 12 dimensions"):
        pca(cache, workshop, components=99)


def test_the_codec_of_the_artifact_reconstructs_within_a_bucket(cache: Publish, workshop: Make) -> None:
    artifact, x_ND = pca(cache, workshop, share=0.999, range_quantiles=(0.0, 1.0))
    codec = PcaCodec.open(artifact.uri)
    projections_NK = codec.project(x_ND)
    again_NK = codec.project(codec.decode(codec.encode(x_ND)))
    assert (np.abs(projections_NK - again_NK) <= codec.width_K * 0.5001 + 1e-7).all()
    error = np.square(codec.decode(codec.encode(x_ND)) - x_ND).sum() / np.square(x_ND - x_ND.mean(axis=0)).sum()
    assert error < 0.01, "the paper's bound: mean-squared reconstruction error < 1%"


LINE = PcaCodec(np.zeros(1), np.ones((1, 1)), np.array([-2.0]), np.array([3.0]), 64)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=20))
def test_codes_rise_with_the_value_and_stay_in_range(values: list[float]) -> None:
    codes = LINE.encode(np.sort(np.array(values))[:, None])[:, 0]
    assert (np.diff(codes) >= 0).all()
    assert 0 <= codes.min() <= codes.max() <= 63


@given(st.integers(0, 63))
def test_every_code_decodes_to_a_value_that_has_it(code: int) -> None:
    assert LINE.encode(LINE.decode(np.array([[code]])))[0, 0] == code


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=20))
def test_codes_do_not_depend_on_the_batch(values: list[float]) -> None:
    column = np.array(values)[:, None]
    alone = np.concatenate([LINE.encode(column[index : index + 1]) for index in range(len(column))])
    assert np.array_equal(LINE.encode(column), alone)
