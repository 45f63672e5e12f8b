"""What an embedding carries: a linear probe reads a scene's attributes from it.

The probe is a ridge classifier (least squares on one-hot labels) fitted on the training rows' true z_i. Reading the
prior's z_i, the true z_i and z_t of the same held-out captions with it says what the decoder is being told; a cosine
cannot, since most of it is what all scenes share.

Shapes: N rows, D embedding dimension, K labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingest.scenes import Scene
from train.evaluate.intervals import Proportion

Vectors = NDArray[np.float64]


def labels_of(scene: Scene) -> dict[str, str]:
    """The attributes that the probe reads."""
    dominant = scene.dominant
    return {
        "background": scene.background,
        "shape_colour": dominant.colour,
        "shape": dominant.shape,
        "position": f"{scene.dominant_position}",
    }


@dataclass(frozen=True)
class Probe:
    """One attribute's classifier."""

    labels: list[str]
    mean: Vectors  # (D,)
    weights: Vectors  # (D, K)
    bias: Vectors  # (K,)

    @classmethod
    def fit(cls, vectors_ND: NDArray[Any], labels_N: Sequence[str], *, ridge: float = 1e-3) -> Probe:
        """`ridge` is relative to the vectors' mean variance."""
        labels = sorted(set(labels_N))
        x_ND = vectors_ND.astype(np.float64)
        mean_D = x_ND.mean(axis=0)
        x_ND = x_ND - mean_D
        one_hot_NK = np.array([[label == name for name in labels] for label in labels_N], dtype=np.float64)
        bias_K = one_hot_NK.mean(axis=0)
        gram_DD = x_ND.T @ x_ND
        penalty = ridge * np.trace(gram_DD) / len(gram_DD)
        weights_DK = np.linalg.solve(gram_DD + penalty * np.eye(len(gram_DD)), x_ND.T @ (one_hot_NK - bias_K))
        return cls(labels, mean_D, weights_DK, bias_K)

    def read(self, vectors_ND: NDArray[Any]) -> list[str]:
        scores_NK = (vectors_ND.astype(np.float64) - self.mean) @ self.weights + self.bias
        return [self.labels[index] for index in scores_NK.argmax(axis=1)]


def fit_probes(z_i_ND: NDArray[Any], scenes: Sequence[Scene]) -> dict[str, Probe]:
    labels = [labels_of(scene) for scene in scenes]
    return {name: Probe.fit(z_i_ND, [label[name] for label in labels]) for name in labels[0]}


def probe_table(
    probes: Mapping[str, Probe], embeddings: Mapping[str, NDArray[Any]], scenes: Sequence[Scene]
) -> dict[str, dict[str, Any]]:
    """For each named kind of embedding (z_i, prior, z_t) and attribute: the probe's accuracy with its interval."""
    labels = [labels_of(scene) for scene in scenes]
    table: dict[str, dict[str, Any]] = {}
    for kind, vectors_ND in embeddings.items():
        table[kind] = {}
        for name, probe in probes.items():
            read = probe.read(vectors_ND)
            correct = sum(found == label[name] for found, label in zip(read, labels, strict=True))
            table[kind][name] = Proportion(correct, len(labels)).plain()
    return table
