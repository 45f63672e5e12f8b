"""Settings of the source and the evaluation sets."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cluster.settings import Section
from ingest.presets import PRESETS, PresetName, TableFormat

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


class TableConfig(Section):
    """A table of captioned URLs or pictures, tars of pictures, or a folder of them."""

    pairs: str | None = Field(
        default=None, description="path, glob or fsspec URI of Parquet, CSV, TSV, JSONL, or of webdataset tars"
    )
    folder: str | None = Field(default=None, description="a folder of pictures, name.jpg with an optional name.txt")
    preset: PresetName | None = Field(default=None, description="columns of a well-known collection")
    url_column: str | None = Field(default=None, min_length=1, description="null: the preset's, else url")
    caption_column: str | None = Field(default=None, min_length=1, description="null: the preset's, else caption")
    column_names: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(
        default=None, min_length=1, description="names of all columns of a CSV or TSV without a line of names"
    )
    quoted: bool | None = Field(
        default=None, description="quotation marks enclose values of CSV and TSV; null: the preset's, else true"
    )
    image_column: str | None = Field(
        default=None, min_length=1, description="column of a Parquet that holds the pictures: nothing is fetched"
    )

    @model_validator(mode="after")
    def _columns_are_named(self) -> Self:
        table = self.table_format()
        named = table.column_names
        for column in (table.url_column, table.caption_column):
            if named is not None and column not in named:
                raise ValueError(f"column {column!r} is not in column_names, which are {', '.join(named)}")
        return self

    def table_format(self) -> TableFormat:
        """What is set here, else what the preset says, else the usual names."""
        preset = PRESETS[self.preset] if self.preset is not None else TableFormat()
        return TableFormat(
            url_column=self.url_column or preset.url_column,
            caption_column=self.caption_column or preset.caption_column,
            column_names=self.column_names or preset.column_names,
            quoted=preset.quoted if self.quoted is None else self.quoted,
            image_column=self.image_column,
            url_required=self.image_column is None or self.url_column is not None,
        )


class SourceConfig(TableConfig):
    """Where the captioned images come from: a table, tars, a folder, or the built-in scenes."""

    scenes: ScenesConfig | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [key for key in ("pairs", "folder", "scenes") if getattr(self, key) is not None]
        if len(given) > 1:
            both = "both" if len(given) == 2 else "all"
            raise ValueError(f"{' and '.join(given)} are {both} set; a run has one source: leave the others out (null)")
        return self


class EvaluationSetConfig(TableConfig):
    """Pictures that training must not see. Exactly one of pairs, folder and scenes says where they are.

    Where a table's columns are not named here, they are the source's.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="folder name under evaluation/")
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

    def table_format_beside(self, source: TableConfig) -> TableFormat:
        """This set's own columns where it names any, else the source's."""
        own = (self.preset, self.url_column, self.caption_column, self.column_names, self.quoted, self.image_column)
        return (source if all(value is None for value in own) else self).table_format()
