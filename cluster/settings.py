"""The base of every config section: frozen, typed, and strict about what it does not know."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of a recipe. Unknown keys and wrong types are errors; values never change after validation."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True)
