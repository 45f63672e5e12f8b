"""Image ↔ text retrieval with the frozen CLIP (CLIP §3.1.2's zero-shot setting): does it know which goes with which?

Captions may repeat: a hit is any row with the caption (or, from a caption, any picture of that caption). So chance at
k is not k/N: it is one minus the chance that k rows drawn at random are all wrong, averaged over queries.

Shapes: N rows, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.evaluate.intervals import Proportion

TOP = (1, 5)


def retrieval(
    image_ND: NDArray[Any], text_ND: NDArray[Any], captions: Sequence[str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """{"image_to_text" | "text_to_image": {"top1" | "top5": accuracy, interval, chance}} of unit vectors."""
    scores_NN = image_ND.astype(np.float32) @ text_ND.astype(np.float32).T
    names = np.array(captions)
    same_NN = names[:, None] == names[None, :]
    return {"image_to_text": _table(scores_NN, same_NN), "text_to_image": _table(scores_NN.T, same_NN)}


def _table(scores_NN: NDArray[np.float32], same_NN: NDArray[np.bool_]) -> dict[str, dict[str, Any]]:
    count = len(scores_NN)
    order_NN = np.argsort(-scores_NN, axis=1, kind="stable")
    table = {}
    for k in TOP:
        best = min(k, count)
        hit_N = np.take_along_axis(same_NN, order_NN[:, :best], axis=1).any(axis=1)
        right_N = same_NN.sum(axis=1)
        misses = [prod(max(0, count - right - i) / (count - i) for i in range(best)) for right in right_N.tolist()]
        table[f"top{k}"] = Proportion(int(hit_N.sum()), count).plain() | {"chance": 1 - float(np.mean(misses))}
    return table
