"""What the filters of a config depend on beyond the config: for the identity of what they made."""

import hashlib
from typing import Any

from ingest.blocklists import read_block_lists
from ingest.decode_config import BLOCK_LISTS, FiltersConfig
from ingest.user_filters import distribution_of


def filters_identity(filters: FiltersConfig) -> dict[str, Any]:
    """The settings, with the content of block-lists instead of their place, and with the versions of the packages that
    the user's filters come from. Raises `UserError` where a list cannot be read or a package is not installed."""
    identity = filters.model_dump(mode="json")
    texts = read_block_lists(filters)
    for name in BLOCK_LISTS:
        identity[name] = f"sha256:{hashlib.sha256(texts[name]).hexdigest()}" if name in texts else None
    for name in ("pair_filters", "picture_filters"):
        identity[name] = []
        for path in getattr(filters, name):
            package = distribution_of(path, f"images.filters.{name}")
            identity[name].append(f"{path} of {package.name} {package.version}")
    return identity
