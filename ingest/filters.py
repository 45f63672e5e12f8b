"""Filters: small functions that return None, or the fixed word that says why a row is left out."""

from ingest.decode_config import FiltersConfig


class Filters:
    """The filters that are on, with their block-lists read."""

    def __init__(self, config: FiltersConfig, lists: dict[str, bytes]) -> None:
        self._config = config

    def pair(self, url: str, caption: str) -> str | None:
        config = self._config
        if config.min_caption_characters is not None and len(caption) < config.min_caption_characters:
            return "caption_too_short"
        if config.max_caption_characters is not None and len(caption) > config.max_caption_characters:
            return "caption_too_long"
        return None

    def body(self, body: bytes) -> str | None:
        return None

    def picture(self, pixels: object, url: str, caption: str) -> str | None:
        return None


def filters_identity(filters: FiltersConfig) -> dict[str, object]:
    """What belongs into the identity of what these filters made."""
    return filters.model_dump(mode="json")
