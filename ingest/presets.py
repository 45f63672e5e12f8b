"""What a table's columns are called: its own names, or those that a well-known collection is published with.

CC3M and CC12M are TSV without a line of names and without quoting: a quotation mark in a caption is a letter.
"""

from dataclasses import dataclass
from typing import Any, Literal

PresetName = Literal["cc3m", "cc12m", "laion", "coyo", "datacomp"]


@dataclass(frozen=True)
class TableFormat:
    """How a table is read. `column_names` are given for a table that has none; `image_column` holds pictures.

    A table that brings its pictures may have no column of URLs, unless one was asked for: `url_required`.
    """

    url_column: str = "url"
    caption_column: str = "caption"
    column_names: tuple[str, ...] | None = None
    quoted: bool = True
    image_column: str | None = None
    url_required: bool = True

    def plain(self) -> dict[str, Any]:
        """What the rows depend on, beside the files. What is not set is left out: new settings change no identity."""
        settings: dict[str, Any] = {"columns": [self.url_column, self.caption_column]}
        if self.column_names is not None:
            settings["column_names"] = list(self.column_names)
        if not self.quoted:
            settings["quoted"] = False
        if self.image_column is not None:
            settings["image_column"] = self.image_column
        return settings


PRESETS: dict[PresetName, TableFormat] = {
    "cc3m": TableFormat("url", "caption", ("caption", "url"), quoted=False),
    "cc12m": TableFormat("url", "caption", ("url", "caption"), quoted=False),
    "laion": TableFormat("URL", "TEXT"),
    "coyo": TableFormat("url", "text"),
    "datacomp": TableFormat("url", "text"),
}
