"""A run's whole configuration: defaults < recipe < `--set`, checked before anything runs.

A recipe is YAML with a section per component; each section's class lives beside the code that it configures, in a
module that imports neither torch nor ray, so that a wrong key is reported in a blink.
"""

from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator

from cluster.config import ClusterConfig
from cluster.errors import UserError
from cluster.settings import Section
from embed.config import DedupConfig, EmbeddingsConfig, PcaConfig, ViewConfig
from ingest.config import ImagesConfig
from ingest.source_config import EvaluationSetConfig, SourceConfig
from train.config import ClipConfig
from train.families.config import DecoderConfig, PriorConfig, SamplesConfig, UpsamplerConfig


class ReportConfig(Section):
    """The closing page."""

    title: str = ""
    duplicate_examples: int = Field(default=12, ge=0, description="Matched near-duplicates shown side by side.")


class RunConfig(Section):
    """Everything that a run depends on."""

    seed: int = Field(default=0, ge=0)
    source: SourceConfig = SourceConfig()
    evaluation_sets: tuple[EvaluationSetConfig, ...] = ()
    images: ImagesConfig = ImagesConfig()
    clip: ClipConfig
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    dedup: DedupConfig = DedupConfig()
    view: ViewConfig = ViewConfig()
    pca: PcaConfig = PcaConfig()
    prior: PriorConfig
    decoder: DecoderConfig
    upsampler_256: UpsamplerConfig
    upsampler_1024: UpsamplerConfig
    samples: SamplesConfig = SamplesConfig()
    report: ReportConfig = ReportConfig()
    cluster: ClusterConfig = ClusterConfig()

    @field_validator("evaluation_sets")
    @classmethod
    def _names_are_unique(cls, sets: tuple[EvaluationSetConfig, ...]) -> tuple[EvaluationSetConfig, ...]:
        names = [item.name for item in sets]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the name {twice[0]!r} stands twice; give each evaluation set its own")
        return sets


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    folder = resources.files("pipeline") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(recipe: str, overrides: list[str]) -> RunConfig:
    """Resolve a recipe (a name of ours, or a path to YAML) and `a.b=value` overrides. Raises `UserError`."""
    values = _read_yaml(recipe)
    for override in overrides:
        _apply(values, override)
    return parse_config(values, recipe)


def parse_config(values: Any, origin: str) -> RunConfig:
    """Validate plain values. Every problem becomes one line that names field, value and what is allowed."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [f"{origin}: {_describe(problem)}" for problem in error.errors()]
        raise UserError("\n".join(lines)) from error


def recipe_title(recipe: str) -> str:
    """`demo` of `demo` and of `examples/demo.yaml`: names the run's folder where none is given."""
    return Path(recipe).name.removesuffix(".yaml").removesuffix(".yml")


def _read_yaml(recipe: str) -> dict[str, Any]:
    names = recipe_names()
    if recipe in names:
        text = (resources.files("pipeline") / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
    else:
        try:
            text = Path(recipe).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"no recipe {recipe!r}: it is neither one of ours ({', '.join(names)}) nor a readable file "
                f"({error.strerror})."
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(f"{recipe} is not UTF-8 text.") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{recipe} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{recipe} is not a recipe: a mapping of sections is expected, not {type(values).__name__}.")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise UserError(f"--set {override!r}: expected section.key=value.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {path}: {text!r} is not a YAML value.") from error
    *parents, last = path.split(".")
    for depth, parent in enumerate(parents):
        inner = values.setdefault(parent, {})
        if inner is None:
            inner = values[parent] = {}
        if not isinstance(inner, dict):
            raise UserError(f"--set {override!r}: {'.'.join(parents[: depth + 1])} is {inner!r}, which has no keys.")
        values = inner
    values[last] = value


def _describe(problem: Any) -> str:
    path, given = ".".join(str(part) for part in problem["loc"]), problem.get("input")
    if problem["type"] == "extra_forbidden":
        return f"{path} is not a known key.{_near(problem['loc'])}"
    if problem["type"] == "missing":
        return f"{path} is missing."
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(given, dict | list) else f" is {given!r}:"
    return f"{path}{shown} {message}" if path else message


def _near(path: tuple[int | str, ...]) -> str:
    """The keys that stand where the unknown one was written, closest first."""
    import difflib

    section: Any = RunConfig
    for part in path[:-1]:
        if isinstance(part, str) and isinstance(section, type) and issubclass(section, Section):
            field = section.model_fields.get(part)
            section = field.annotation if field else None
    if not (isinstance(section, type) and issubclass(section, Section)):
        return ""
    known = list(section.model_fields)
    close = difflib.get_close_matches(str(path[-1]), known, n=1)
    return f" Did you mean {close[0]}?" if close else f" Known here: {', '.join(known)}."
