"""Train or validation, by a keyed hash of the pair's identity.

A pair's split depends on its `pair_id` and the fraction alone: growth, another order or another shard size moves
nobody, and a larger fraction only moves pairs from train to validation, never back.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

TRAIN, VALIDATION = "train", "validation"
KEY = b"unclip split 1"


def split_of(pair_id: bytes, validation_fraction: float) -> str:
    """`train` or `validation`."""
    return VALIDATION if _position(pair_id) < _threshold(validation_fraction) else TRAIN


def is_validation(pair_ids: Iterable[bytes], validation_fraction: float) -> NDArray[np.bool_]:
    """`split_of` for many pairs: true where the pair is in the validation split."""
    threshold = _threshold(validation_fraction)
    return np.fromiter((_position(pair_id) < threshold for pair_id in pair_ids), dtype=np.bool_)


def _position(pair_id: bytes) -> int:
    """Uniform on [0, 2⁶⁴)."""
    return int.from_bytes(hashlib.blake2b(pair_id, digest_size=8, key=KEY).digest(), "big")


def _threshold(validation_fraction: float) -> int:
    if not 0.0 <= validation_fraction <= 1.0:
        raise ValueError(f"validation_fraction is {validation_fraction}; a share in [0, 1] is needed")
    return int(validation_fraction * 2**64)
