"""How often generated scenes show what their captions say, against pictures of other captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingest.scenes import Scene, parse_caption
from train.evaluate.intervals import Proportion
from train.evaluate.oracle import ATTRIBUTES, Reading, read_picture


def scenes_of(captions: Sequence[str]) -> list[Scene] | None:
    """The scenes that captions describe; None where one of them is not of the scene grammar."""
    try:
        return [parse_caption(caption) for caption in captions]
    except ValueError:
        return None


def accuracy(pictures: Sequence[NDArray[np.uint8]], scenes: Sequence[Scene]) -> dict[str, dict[str, Any]]:
    """Each attribute's share of correct pictures with its 95% interval, and `chance`.

    Chance is what the same pictures score against the other captions of the set: a model that draws good scenes and
    ignores its caption gets that much.
    """
    readings = [read_picture(picture) for picture in pictures]
    correct = {name: sum(r.agrees(s)[name] for r, s in zip(readings, scenes, strict=True)) for name in ATTRIBUTES}
    chance = _against_others(readings, scenes)
    return {name: Proportion(correct[name], len(scenes)).plain() | {"chance": chance[name]} for name in ATTRIBUTES}


def _against_others(readings: Sequence[Reading], scenes: Sequence[Scene]) -> dict[str, float | None]:
    if len(scenes) < 2:
        return dict.fromkeys(ATTRIBUTES)
    hits = dict.fromkeys(ATTRIBUTES, 0)
    for index, reading in enumerate(readings):
        for other, scene in enumerate(scenes):
            if other != index:
                for name, agrees in reading.agrees(scene).items():
                    hits[name] += agrees
    return {name: count / (len(scenes) * (len(scenes) - 1)) for name, count in hits.items()}
