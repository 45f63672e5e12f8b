"""A run's sources, opened once: the training table and the evaluation sets, checked before any work starts."""

import json
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from cluster.artifact import read_manifest
from cluster.canonical import canonical_json
from cluster.errors import UserError
from cluster.storage import Folder
from ingest.presets import TableFormat
from ingest.scene_server import SceneServer, write_scene_tables
from ingest.sources import Source, open_evaluation_set, open_pairs, open_training_source, source_identity
from pipeline.config import RunConfig
from pipeline.stage import Wishes

REMEMBERED = "source/files.json"


class RunSources:
    """Sources by the name of the `pairs` artifact that they become: `pairs`, `evaluation/<name>/pairs`.

    The built-in scenes are described by their settings, and their tables are written when first read; the sha256 of
    files on disk are remembered in the run's folder by path, size and time of change.
    """

    def __init__(self, config: RunConfig, folder: Folder, wishes: Wishes = Wishes()) -> None:  # noqa: B008
        self._config = config
        self._folder = folder
        self._wishes = wishes
        self._sets = {f"evaluation/{item.name}/pairs": item for item in config.evaluation_sets}
        self._opened: dict[str, Source] = {}
        self._scene_tables: dict[str, str] = {}

    def check(self) -> None:
        """Open everything that is a file. Raises `UserError` for what cannot be a source."""
        source = self._config.source
        for name, item in self._sets.items():
            if item.scenes is not None and source.scenes is None:
                raise UserError(f"evaluation set {item.name!r} asks for scenes, and source.scenes is not set.")
            if item.scenes is None:
                self.open(name)
        if source.scenes is None:
            self.open("pairs")

    def snapshots(self, name: str) -> list[dict[str, Any]]:
        """The states of the source that the `pairs` artifact of this name is, or is to be, made from, oldest first.

        What is published and ends with the source as it is now stands. Where growth is asked for, the source as it is
        now comes after what is published.
        """
        asked = json.loads(canonical_json(self.identity(name)))
        manifest = read_manifest(self._folder / name) if name != self._wishes.rebuild else None
        had: list[dict[str, Any]] = manifest.identity["settings"].get("snapshots", []) if manifest is not None else []
        pruned = asked | {"pruned": True}
        wanted = pruned if self._wishes.prune else asked
        if had and had[-1] in (wanted, pruned):
            return had
        return [*had, wanted] if self._wishes.grow and had else [asked]

    def grown(self, name: str) -> bool:
        """Does the source as it is now come after snapshots that are published?"""
        return self._wishes.grow and len(self.snapshots(name)) > 1

    def identity(self, name: str) -> dict[str, Any]:
        """What the table is, for the identity of the `pairs` artifact made of it."""
        scenes, item = self._config.source.scenes, self._sets.get(name)
        if scenes is not None and self._is_scenes(name):
            return {"scenes": scenes.model_dump(mode="json"), "set": item.scenes if item else "training"}
        remembered = json.loads(self._folder.read(REMEMBERED)) if self._folder.exists(REMEMBERED) else {}
        before = json.dumps(remembered, sort_keys=True)
        identity = source_identity(self.open(name), remembered)
        if json.dumps(remembered, sort_keys=True) != before:
            self._folder.write(REMEMBERED, json.dumps(remembered, indent=1, sort_keys=True).encode())
        return identity

    def open(self, name: str) -> Source:
        if name not in self._opened:
            source, item = self._config.source, self._sets.get(name)
            if item is not None:
                table = self._scene_table(item.scenes) if item.scenes is not None else None
                self._opened[name] = open_evaluation_set(item, source, scene_table=table)
            elif source.scenes is not None:
                self._opened[name] = open_pairs(self._scene_table("training"), TableFormat())
            else:
                self._opened[name] = open_training_source(source)
        return self._opened[name]

    def table_format(self, name: str) -> TableFormat:
        """How the table is read: its columns, by name."""
        source, item = self._config.source, self._sets.get(name)
        if self._is_scenes(name):
            return TableFormat()
        return source.table_format() if item is None else item.table_format_beside(source)

    def pictures(self, name: str) -> dict[str, Any] | None:
        """What the pictures that a source brings along are read by; None where they are fetched from their URLs."""
        return None if self._is_scenes(name) else self.open(name).pictures()

    def serving(self) -> AbstractContextManager[Any]:
        """The loopback server of the scenes while the block runs; nothing where URLs lead elsewhere."""
        scenes = self._config.source.scenes
        return nullcontext() if scenes is None else SceneServer(scenes)

    def _is_scenes(self, name: str) -> bool:
        item = self._sets.get(name)
        return (self._config.source if item is None else item).scenes is not None

    def _scene_table(self, name: str) -> str:
        scenes = self._config.source.scenes
        assert scenes is not None, "check() comes first"
        if not self._scene_tables:
            self._scene_tables = write_scene_tables(f"{self._folder.uri}/source", scenes)
        return self._scene_tables[name]
