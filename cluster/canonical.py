"""One spelling for one value, so that equal requests have equal digests.

JSON with sorted keys, no spaces, UTF-8, and no value that could be spelled in two ways: NaN, infinities, bytes,
sets and non-string keys are refused rather than guessed at.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

JSON = dict[str, Any] | list[Any] | str | int | float | bool | None
CHUNK_BYTES = 1 << 20


def canonical_json(value: Any) -> bytes:
    """Canonical JSON of `value`. Raises `TypeError` or `ValueError`, with the path, for what has no single spelling."""
    _check(value, "$")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    """SHA-256 (hex) of a local file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(value: Any, path: str) -> None:
    if value is None or isinstance(value, str | bool | int):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{path} is {value!r}, which JSON cannot spell")
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{path} has the key {key!r}; only strings have a single spelling")
            _check(item, f"{path}.{key}")
        return
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check(item, f"{path}[{index}]")
        return
    raise TypeError(f"{path} is a {type(value).__name__}, which has no canonical JSON")
