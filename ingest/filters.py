"""Filters: small functions that return None, or the fixed word that says why a row is left out (status `filtered`).

    of the pair       blocked_url, blocked_domain, caption_too_short, caption_too_long, blocked_caption,
                      caption_boilerplate, caption_language, then the user's pair_filters
    of the file       blocked_image, by hash
    of the picture    too_small, aspect_ratio (from its header: `ingest.decode`), blocked_image (perceptually),
                      near_constant, then the user's picture_filters

The first that answers is the reason. Libraries and models are loaded for what is on, and nothing else.
"""

from collections.abc import Callable
from typing import Any

from ingest.blocklists import BlockedCaptions, BlockedDomains, BlockedImages, BlockedUrls
from ingest.decode_config import FiltersConfig
from ingest.perceptual import perceptual_hash
from ingest.resize import Pixels, area
from ingest.user_filters import UserFilter, user_filter

PairFilter = Callable[[str, str], str | None]

_CONTRAST_SIDE = 32


class Filters:
    """The filters that are on. `lists` are the block-lists' texts (`read_block_lists`)."""

    def __init__(self, config: FiltersConfig, lists: dict[str, bytes]) -> None:
        self._min_contrast = config.min_contrast
        self._distance = config.blocked_image_distance
        self._blocked_images = BlockedImages(lists["blocked_images"]) if "blocked_images" in lists else None
        self._of_pictures = [user_filter(path, "images.filters.picture_filters") for path in config.picture_filters]
        self._of_pairs_by_user = [user_filter(path, "images.filters.pair_filters") for path in config.pair_filters]
        self._of_pairs: list[PairFilter] = [*_pair_filters(config, lists), *self._of_pairs_by_user]

    @property
    def needs_thumbnail(self) -> bool:
        """Whether `picture` wants the whole picture, small: the perceptual hash does not depend on the crop."""
        return self._blocked_images is not None and self._blocked_images.has_perceptual

    def pair(self, url: str, caption: str) -> str | None:
        return _first(self._of_pairs, url, caption)

    def body(self, body: bytes) -> str | None:
        blocked = self._blocked_images is not None and self._blocked_images.has_file(body)
        return "blocked_image" if blocked else None

    def picture(self, pixels: Pixels, thumbnail: Pixels | None, url: str, caption: str) -> str | None:
        blocked = self._blocked_images
        if blocked and thumbnail is not None and blocked.has_picture(perceptual_hash(thumbnail), self._distance):
            return "blocked_image"
        if self._min_contrast is not None and contrast(pixels) < self._min_contrast:
            return "near_constant"
        if not self._of_pictures:
            return None
        shown = pixels.view()
        shown.flags.writeable = False
        return _first(self._of_pictures, shown, url, caption)

    def failures(self) -> list[str]:
        """How user filters failed, each told once."""
        told = []
        for user in (*self._of_pairs_by_user, *self._of_pictures):
            if user.failure is not None:
                told.append(user.failure)
                user.failure = None
        return told


def contrast(pixels: Pixels) -> int:
    """Between the darkest and the lightest of 32 × 32 area means, in the channel where it is largest (0…255)."""
    means = area(pixels, (min(_CONTRAST_SIDE, pixels.shape[1]), min(_CONTRAST_SIDE, pixels.shape[0])))
    return int((means.max(axis=(0, 1)).astype(int) - means.min(axis=(0, 1))).max())


def _pair_filters(config: FiltersConfig, lists: dict[str, bytes]) -> list[PairFilter]:
    """Those of ours that are on, cheap ones first."""
    chosen: list[PairFilter] = []
    if "blocked_urls" in lists:
        urls = BlockedUrls(lists["blocked_urls"])
        chosen.append(lambda url, _: "blocked_url" if urls.has(url) else None)
    if "blocked_domains" in lists:
        domains = BlockedDomains(lists["blocked_domains"])
        chosen.append(lambda url, _: "blocked_domain" if domains.has(url) else None)
    shortest, longest = config.min_caption_characters, config.max_caption_characters
    if shortest is not None:
        chosen.append(lambda _, caption: "caption_too_short" if len(caption) < shortest else None)
    if longest is not None:
        chosen.append(lambda _, caption: "caption_too_long" if len(caption) > longest else None)
    if "blocked_captions" in lists:
        captions = BlockedCaptions(lists["blocked_captions"])
        chosen.append(lambda _, caption: "blocked_caption" if captions.has(caption) else None)
    if config.boilerplate or config.boilerplate_patterns:
        from ingest.boilerplate import DEFAULT_PATTERNS, Boilerplate

        boilerplate = Boilerplate((*(DEFAULT_PATTERNS if config.boilerplate else ()), *config.boilerplate_patterns))
        chosen.append(lambda _, caption: "caption_boilerplate" if boilerplate.is_in(caption) else None)
    if config.languages:
        from ingest.language import Languages

        languages = Languages(config.languages)
        chosen.append(lambda _, caption: None if languages.has(caption) else "caption_language")
    return chosen


def _first(filters: "list[UserFilter] | list[PairFilter]", *arguments: Any) -> str | None:
    return next((reason for each in filters if (reason := each(*arguments)) is not None), None)
