"""A run's sources, opened once: the training table and the evaluation sets, checked before any work starts."""

import json
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from cluster.errors import UserError
from cluster.storage import Folder
from ingest.scene_server import SceneServer, write_scene_tables
from ingest.sources import FolderSource, Source, open_evaluation_set, open_source, source_identity
from pipeline.config import RunConfig

REMEMBERED = "source/files.json"


class RunSources:
    """Sources by the name of the `pairs` artifact that they become: `pairs`, `evaluation/<name>/pairs`.

    The built-in scenes are described by their settings, and their tables are written when first read; the sha256 of
    files on disk are remembered in the run's folder by path, size and time of change.
    """

    def __init__(self, config: RunConfig, folder: Folder) -> None:
        self._config = config
        self._folder = folder
        self._sets = {f"evaluation/{item.name}/pairs": item for item in config.evaluation_sets}
        self._opened: dict[str, Source] = {}
        self._scene_tables: dict[str, str] = {}

    def check(self) -> None:
        """Open everything that is a file. Raises `UserError` for what cannot be a source."""
        source = self._config.source
        if source.pairs is None and source.scenes is None:
            raise UserError("source.pairs is not set. Name a table of URLs and captions: --set source.pairs=TABLE")
        for name, item in self._sets.items():
            if item.scenes is not None and source.scenes is None:
                raise UserError(f"evaluation set {item.name!r} asks for scenes, and source.scenes is not set.")
            if item.scenes is None:
                self.open(name)
        if source.scenes is None:
            self.open("pairs")

    def identity(self, name: str) -> dict[str, Any]:
        """What the table is, for the identity of the `pairs` artifact made of it."""
        scenes = self._config.source.scenes
        item = self._sets.get(name)
        if scenes is not None and (item is None or item.scenes is not None):
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
                self._opened[name] = open_source(self._scene_table("training"))
            else:
                assert source.pairs is not None, "check() comes first"
                self._opened[name] = open_source(
                    source.pairs, url_column=source.url_column, caption_column=source.caption_column
                )
        return self._opened[name]

    def picture_folder(self, pairs_name: str) -> str | None:
        """The folder that an evaluation set's pictures lie in, where it is one of pictures and not of URLs."""
        item = self._sets.get(pairs_name)
        source = self.open(pairs_name) if item is not None and item.folder is not None else None
        return source.root if isinstance(source, FolderSource) else None

    def serving(self) -> AbstractContextManager[Any]:
        """The loopback server of the scenes while the block runs; nothing where URLs lead elsewhere."""
        scenes = self._config.source.scenes
        return nullcontext() if scenes is None else SceneServer(scenes)

    def _scene_table(self, name: str) -> str:
        scenes = self._config.source.scenes
        assert scenes is not None, "check() comes first"
        if not self._scene_tables:
            self._scene_tables = write_scene_tables(f"{self._folder.uri}/source", scenes)
        return self._scene_tables[name]
