"""Settings of the source, the evaluation sets and the images stage.

`content_settings()` of a section returns what shapes the artifact's bytes and therefore belongs into its identity.
What it leaves out (patience with the network, concurrency) may change between two runs on the same folder.
"""

import ipaddress
import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from cluster.settings import Section

SceneSet = Literal["heldout_captions", "heldout_pairs", "copies"]
ImageFormat = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]


class ScenesConfig(Section):
    """Captioned pictures from the built-in grammar, served on loopback: a source that needs no network."""

    count: int = Field(default=4000, ge=1, le=10_000_000, description="training scenes")
    seed: int = Field(default=0, ge=0)
    port: int = Field(default=8642, ge=1, le=65535, description="loopback port of the scene server")
    picture_size: int = Field(default=256, ge=16, le=2048)
    misbehaving_share: float = Field(
        default=0.001, ge=0, le=0.05, description="share of training rows for each kind of misbehaviour, at least one"
    )
    heldout_captions: int = Field(default=128, ge=1, description="rows of the evaluation set heldout_captions")
    heldout_pairs: int = Field(default=128, ge=1, description="rows of the evaluation set heldout_pairs")
    copies: int = Field(default=64, ge=2, description="rows of the evaluation set copies")
    copied_share: float = Field(
        default=0.5, gt=0, lt=1, description="share of `copies` that are near-duplicates of training pictures"
    )


class SourceConfig(Section):
    """Where the captioned image URLs come from: a table, or the built-in scenes."""

    pairs: str | None = Field(default=None, description="path, glob or fsspec URI of Parquet, CSV, TSV or JSONL")
    url_column: str = Field(default="url", min_length=1)
    caption_column: str = Field(default="caption", min_length=1)
    scenes: ScenesConfig | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.pairs is not None and self.scenes is not None:
            raise ValueError("pairs and scenes are both set; a run has one source: leave one of them out (null)")
        return self


class EvaluationSetConfig(Section):
    """Pictures that training must not see. Exactly one of pairs, folder and scenes says where they are."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="folder name under evaluation/")
    pairs: str | None = Field(default=None, description="a table with the source's columns")
    folder: str | None = Field(default=None, description="a folder of pictures, name.jpg with an optional name.txt")
    scenes: SceneSet | None = Field(default=None, description="a set of the built-in scenes; needs source.scenes")

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        given = [key for key in ("pairs", "folder", "scenes") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(
                f"evaluation set {self.name!r} sets {' and '.join(given) or 'none'} of pairs, folder, scenes; "
                "set exactly one"
            )
        return self


_NETWORK = re.compile(
    r"^(?:\[(?P<v6>[0-9A-Fa-f:.]+)\](?P<v6_mask>/\d+)?|(?P<bare>[0-9A-Fa-f:.]+?/\d+|[0-9.]+))(?::(?P<port>\d+))?$"
)


def parse_network(text: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, int | None]:
    """`10.0.0.0/8`, `127.0.0.1/32:8642`, `fd00::/8`, `[::1]/128:8642` → the network, and its port if it names one."""
    match = _NETWORK.match(text.strip())
    try:
        if match is None:
            raise ValueError("not of the form network/bits or network/bits:port")
        address = match["bare"] or f"{match['v6']}{match['v6_mask'] or ''}"
        port = None if match["port"] is None else int(match["port"])
        if port is not None and not 1 <= port <= 65535:
            raise ValueError(f"port {port} is outside 1…65535")
        return ipaddress.ip_network(address), port
    except ValueError as error:
        raise ValueError(
            f"{text!r} is not a network ({error}); write 10.0.0.0/8, 127.0.0.1/32:8642, fd00::/8 or [::1]/128:8642"
        ) from None


def _checked_network(text: str) -> str:
    parse_network(text)
    return text


class FiltersConfig(Section):
    """Rows to leave out; every one is off (null) unless a recipe sets it."""

    min_caption_characters: int | None = Field(default=None, ge=1)
    max_caption_characters: int | None = Field(default=None, ge=1)
    min_side: int | None = Field(default=None, ge=1, description="pixels of the smaller side of the original")
    max_aspect_ratio: float | None = Field(default=None, ge=1, description="longer side over shorter side")


class ImagesConfig(Section):
    """How pictures are fetched, decoded and stored."""

    shard_rows: int = Field(default=1000, ge=1, le=1_000_000)
    size: int = Field(default=256, ge=8, le=4096)
    resize: Literal["center_crop", "keep_ratio", "pad"] = "center_crop"
    format: Literal["jpg", "png", "webp"] = "jpg"
    quality: int = Field(default=95, ge=1, le=100)
    accept: tuple[ImageFormat, ...] = Field(default=("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"), min_length=1)
    max_pixels: int = Field(default=100_000_000, ge=1, description="of the original, read before any decoding")
    max_bytes: int = Field(default=20_000_000, ge=1, description="of a body as it arrives")
    max_decompressed_bytes: int = Field(default=40_000_000, ge=1, description="of a body sent compressed")
    allow_networks: tuple[Annotated[str, AfterValidator(_checked_network)], ...] = Field(
        default=(), description="networks that may be fetched from although private: CIDR, with an optional :port"
    )
    respect_robots_tag: bool = Field(default=True, description="X-Robots-Tag: noai, noimageai, noindex, noimageindex")
    filters: FiltersConfig = FiltersConfig()

    user_agent: str = Field(default="unclip/0.1 (image dataset builder; +https://pypi.org/project/unclip-pipeline/)")
    deadline_s: float = Field(default=10.0, gt=0, description="for a URL, all attempts and redirects together")
    min_rate_after_s: float = Field(default=5.0, gt=0)
    min_bytes_per_s: float = Field(default=1000.0, ge=0, description="required of a body after min_rate_after_s")
    attempts: int = Field(default=3, ge=1, le=10)
    backoff_s: float = Field(default=0.25, gt=0, description="before the second attempt; doubles for each further one")
    concurrency: int = Field(default=128, ge=1, le=4096, description="rows in flight in one worker")
    connections_per_host: int = Field(default=16, ge=1, description="in one worker; not inside allow_networks")
    decode_threads: int = Field(default=2, ge=1, le=64)

    _NOT_CONTENT: ClassVar[frozenset[str]] = frozenset(
        {
            "user_agent",
            "deadline_s",
            "min_rate_after_s",
            "min_bytes_per_s",
            "attempts",
            "backoff_s",
            "concurrency",
            "connections_per_host",
            "decode_threads",
        }
    )

    def content_settings(self) -> dict[str, Any]:
        """What the shards' bytes depend on."""
        return self.model_dump(mode="json", exclude=set(self._NOT_CONTENT))
