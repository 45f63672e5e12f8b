"""A stage: frozen data that says what to build, and a plain function that builds it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.artifact import Artifact, Request, ShardEntry
from cluster.session import Session
from cluster.storage import Folder
from cluster.workshop import Workshop
from pipeline.config import RunConfig
from pipeline.progress import StageProgress


@dataclass(frozen=True)
class Stage:
    """One box of the figure.

    `settings` picks from the config what shapes content: it is the stage's part of the artifact's identity, together
    with the content digests of `inputs`. `code_version` is raised by hand when the code's output changes.
    """

    name: str
    code_version: int
    inputs: tuple[str, ...]
    settings: Callable[[RunConfig], dict[str, Any]]
    run: "Callable[[Build], int]"

    @property
    def section(self) -> str:
        """The config section that it depends on, and the word for messages."""
        return self.name.rsplit("/", 1)[-1]

    def request(self, config: RunConfig, inputs: dict[str, str]) -> Request:
        return Request(self.name, self.code_version, self.settings(config), inputs)


@dataclass(frozen=True)
class Wishes:
    """What a person asks of this run beyond its recipe.

    `retry` holds ledger statuses, `accept` held shards by artifact; `grow` takes a new snapshot of a source into the
    pairs that are there, and `prune` removes those that the snapshot does not have any more.
    """

    rebuild: str | None = None
    retry: tuple[str, ...] = ()
    accept: dict[str, frozenset[int]] = field(default_factory=dict)
    grow: bool = False
    prune: bool = False
    allow_mixed: bool = False


@dataclass
class Build:
    """What a stage's function is given. It commits shards to `workshop` and returns how many the artifact has.

    `published` is what stands there built with the same settings, if anything: shards of it that are still what would
    be built become `inherited`, and are published again as they are. `amends` says what is to be changed of it.
    """

    name: str
    config: RunConfig
    folder: Folder
    inputs: dict[str, Artifact]
    workshop: Workshop
    session: Session
    progress: StageProgress
    wishes: Wishes
    published: Artifact | None = None
    amends: dict[str, Any] = field(default_factory=dict)
    inherited: Mapping[int, ShardEntry] = field(default_factory=dict)

    def uris(self) -> dict[str, str]:
        return {name: artifact.uri for name, artifact in self.inputs.items()}

    def scratch(self, name: str) -> Folder:
        """A folder of the run for what a stage leaves beside the artifacts (logs, tables of a generated source)."""
        return self.folder / name
