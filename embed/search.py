"""Exact search for near-duplicates: a flat inner-product index over an evaluation set, training rows stream past it.

The evaluation set is small and the training set is not, so the index holds the former. Range search returns every
pair above the threshold, not the nearest one only.

Shapes: N training rows, E evaluation rows, M matches, D embedding dimension.
"""

from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Matches:
    """Pairs above the threshold, (M,) each: by query row, then from the best score down, then by evaluation row."""

    query: NDArray[np.int64]
    evaluation: NDArray[np.int64]
    score: NDArray[np.float32]

    def bounded(self, per_query: int) -> tuple["Matches", NDArray[np.int32], int]:
        """The best `per_query` of each query, their ranks from 0, and how many were left out."""
        starts = np.searchsorted(self.query, self.query, side="left")
        rank_M = np.arange(len(self.query)) - starts
        keep = rank_M < per_query
        kept = Matches(self.query[keep], self.evaluation[keep], self.score[keep])
        return kept, rank_M[keep].astype(np.int32), int((~keep).sum())


class FlatSearch:
    """Cosine range search against the vectors (E, D) of one evaluation set."""

    def __init__(self, vectors_ED: NDArray[np.float16]) -> None:
        self._index = faiss.IndexFlatIP(vectors_ED.shape[1])
        if len(vectors_ED):
            self._index.add(unit_float32(vectors_ED))

    def above(self, queries_ND: NDArray[np.float16], threshold: float) -> Matches:
        """Every (query, evaluation row) whose cosine is greater than `threshold`."""
        if not len(queries_ND) or not self._index.ntotal:
            return Matches(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
        limits, score, evaluation = self._index.range_search(unit_float32(queries_ND), threshold)
        query = np.repeat(np.arange(len(queries_ND)), (limits[1:] - limits[:-1]).astype(np.int64))
        order = np.lexsort((evaluation, -score, query))
        return Matches(query[order], evaluation[order], score[order])


def unit_float32(vectors_ND: NDArray[np.float16]) -> NDArray[np.float32]:
    """float32 of unit length again: rounding to float16 moved each norm by up to 5e-4."""
    vectors = vectors_ND.astype(np.float32)
    norm_N1 = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: NDArray[np.float32] = vectors / norm_N1
    return unit
