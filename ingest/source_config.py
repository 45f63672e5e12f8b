"""Settings of the source and the evaluation sets."""

from typing import Literal, Self

from pydantic import Field, model_validator

from cluster.settings import Section

SceneSet = Literal["heldout_captions", "heldout_pairs", "copies"]


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
