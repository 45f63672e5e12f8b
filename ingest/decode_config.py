"""Settings of decoding, resizing and filtering."""

from typing import ClassVar, Literal

from pydantic import Field

from cluster.settings import Section

ImageFormat = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]


# Settings of FiltersConfig that name a block-list.
BLOCK_LISTS = ("blocked_urls", "blocked_domains", "blocked_captions", "blocked_images")

_OF_PAIRS = (
    "min_caption_characters",
    "max_caption_characters",
    "languages",
    "boilerplate",
    "boilerplate_patterns",
    "blocked_urls",
    "blocked_domains",
    "blocked_captions",
    "pair_filters",
)


class FiltersConfig(Section):
    """Rows to leave out; every one is off unless a recipe sets it. A block-list is a text file at any fsspec URI."""

    min_caption_characters: int | None = Field(default=None, ge=1)
    max_caption_characters: int | None = Field(default=None, ge=1)
    languages: tuple[str, ...] = Field(default=(), description="wanted ones, two letters each (ISO 639-1)")
    boilerplate: bool = Field(default=False, description="leave out captions that our patterns call boilerplate")
    boilerplate_patterns: tuple[str, ...] = Field(default=(), description="more of them, in RE2's syntax")
    min_side: int | None = Field(default=None, ge=1, description="pixels of the smaller side of the original")
    max_aspect_ratio: float | None = Field(default=None, ge=1, description="longer side over shorter side")
    min_contrast: int | None = Field(
        default=None, ge=1, le=255, description="from darkest to lightest of 32 × 32 area means"
    )
    blocked_urls: str | None = Field(default=None, description="block-list")
    blocked_domains: str | None = Field(default=None, description="block-list; subdomains are meant too")
    blocked_captions: str | None = Field(default=None, description="block-list of words and phrases")
    blocked_images: str | None = Field(
        default=None, description="block-list of hashes: MD5, SHA-1, SHA-256, perceptual"
    )
    blocked_image_distance: int = Field(
        default=4, ge=0, le=20, description="bits by which a perceptual hash may differ"
    )
    pair_filters: tuple[str, ...] = Field(default=(), description="your own on (url, caption): package.module:function")
    picture_filters: tuple[str, ...] = Field(default=(), description="your own on (pixels, url, caption)")

    @property
    def judge_pairs(self) -> bool:
        """Whether any of them looks at url and caption."""
        off = FiltersConfig()
        return any(getattr(self, name) != getattr(off, name) for name in _OF_PAIRS)


class DecodeConfig(Section):
    """How pictures are decoded, filtered and stored."""

    size: int = Field(default=256, ge=8, le=4096)
    resize: Literal["center_crop", "keep_ratio", "pad"] = "center_crop"
    format: Literal["jpg", "png", "webp"] = "jpg"
    quality: int = Field(default=95, ge=1, le=100)
    accept: tuple[ImageFormat, ...] = Field(default=("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"), min_length=1)
    max_pixels: int = Field(default=100_000_000, ge=1, description="of the original, read before any decoding")
    max_frames: int = Field(default=1000, ge=1, description="of an animation, or pictures of a file")
    max_icc_bytes: int = Field(default=4_000_000, ge=0, description="of a colour profile, as stored")
    max_metadata_bytes: int = Field(default=8_000_000, ge=0, description="EXIF, XMP, text and comments, as stored")
    filters: FiltersConfig = FiltersConfig()

    decode_processes: int = Field(default=1, ge=1, le=64, description="of one worker")
    decode_deadline_s: float = Field(
        default=10.0, gt=0, description="CPU seconds of a picture, and a quarter of what it may take on the clock"
    )
    decode_memory_bytes: int = Field(
        default=700_000_000, ge=64_000_000, description="what a decoding process may need beyond its memory at rest"
    )

    NOT_CONTENT: ClassVar[frozenset[str]] = frozenset({"decode_processes", "decode_deadline_s", "decode_memory_bytes"})
