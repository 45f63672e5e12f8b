"""Settings of the images stage: the guarded fetch, the decoder, and what a shard is.

`content_settings()` returns what shapes the artifact's bytes and therefore belongs into its identity. What it leaves
out (patience with the network, concurrency) may change between two runs on the same folder.
"""

from typing import Any, ClassVar

from pydantic import Field

from cluster.settings import Section
from ingest.decode_config import DecodeConfig
from ingest.fetch_config import FetchConfig


class HoldConfig(Section):
    """Which shards are held back: their success rate says that something was wrong with us, not with the web.

    The success rate is ok rows over those that were ok, fetch_failed or undecodable; a shard with fewer than `min_rows`
    of them is never judged.
    """

    below: float = Field(default=0.05, ge=0, le=1, description="absolute floor of the success rate")
    below_siblings: float = Field(default=0.5, ge=0, le=1, description="floor as a share of the siblings' median rate")
    min_siblings: int = Field(default=8, ge=1, description="shards that must be done before siblings are compared")
    min_rows: int = Field(default=20, ge=1, description="rows that a shard must have tried to be judged at all")


class ImagesConfig(FetchConfig, DecodeConfig):
    """How pictures are fetched, decoded and stored."""

    shard_rows: int = Field(default=1000, ge=1, le=1_000_000)
    hold: HoldConfig = HoldConfig()
    shards_in_flight: int = Field(default=16, ge=1, le=64, description="in one worker: a slow tail stops nobody")

    NOT_CONTENT: ClassVar[frozenset[str]] = (
        FetchConfig.NOT_CONTENT | DecodeConfig.NOT_CONTENT | {"hold", "shards_in_flight"}
    )

    def content_settings(self) -> dict[str, Any]:
        """What the shards' bytes depend on."""
        return self.model_dump(mode="json", exclude=set(self.NOT_CONTENT))
