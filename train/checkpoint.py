"""Checkpoints: safetensors and JSON, written by every rank, readable at any number of processes.

    checkpoint-00000400/
      rank-00000-of-00002.safetensors     every `Share` of that rank: "<state>/<parameter>@<first element>", fp32, flat
      rank-00001-of-00002.safetensors
      history.safetensors                 the curve so far: a float64 column of every recorded scalar
      checkpoint.json                     written last: step, what was trained on what, sha256 of the files

A rank writes what it owns and no more, without talking to others, so no process ever holds the whole optimizer. A
reader takes from any files the runs that overlap what it owns. `checkpoint.json` makes a checkpoint: a folder without
one, or with a file that does not hash to what it says, is passed over for the one before. The last two are kept.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from cluster.canonical import canonical_json, sha256_bytes, sha256_file
from cluster.errors import UserError
from cluster.storage import Folder
from train.shares import Share

PREFIX, MARKER, HISTORY, FORMAT, KEPT = "checkpoint-", "checkpoint.json", "history.safetensors", 1, 2
History = list[dict[str, float]]


@dataclass(frozen=True)
class Run:
    """One stretch of a parameter in a file of a checkpoint."""

    key: str
    start: int
    stop: int


class Checkpoint:
    """A complete checkpoint whose files are what its marker says."""

    def __init__(self, folder: Folder, marker: dict[str, Any]) -> None:
        self.folder = folder
        self.step: int = marker["step"]
        self.trained: dict[str, Any] = marker["trained"]
        self._files = sorted(name for name in marker["files"] if name != HISTORY)
        self._runs: dict[tuple[str, str], list[tuple[str, Run]]] | None = None

    def read(self, state: str, name: str, start: int, length: int) -> Tensor:
        """Elements `start … start + length` of a state of a parameter, flat fp32."""
        result = torch.empty(length, dtype=torch.float32)
        filled = 0
        for file, run in self._index().get((state, name), ()):
            low, high = max(run.start, start), min(run.stop, start + length)
            if low >= high:
                continue
            with self._opened(file) as tensors:
                part = tensors.get_slice(run.key)[low - run.start : high - run.start]
            result[low - start : high - start] = part
            filled += high - low
        if filled != length:
            raise UserError(
                f"{self.folder.uri} has {filled} of the {length} elements wanted of {state} of {name!r}; it belongs to "
                "another model. Train into another folder (--out), or delete it to start anew."
            )
        return result

    def parameter(self, state: str, name: str, shape: torch.Size) -> Tensor:
        """A whole parameter: its fp32 weights ("master"), its average ("ema"), or a moment."""
        return self.read(state, name, 0, shape.numel()).view(shape)

    def history(self) -> History:
        columns = load(self.folder.read(HISTORY))
        return [
            dict(zip(columns, row, strict=True)) for row in zip(*(c.tolist() for c in columns.values()), strict=True)
        ]

    def _index(self) -> dict[tuple[str, str], list[tuple[str, Run]]]:
        if self._runs is None:
            self._runs = {}
            for file in self._files:
                with self._opened(file) as tensors:
                    for key in tensors.keys():  # noqa: SIM118 (a safetensors file is no dict)
                        state, _, rest = key.partition("/")
                        name, _, start = rest.rpartition("@")
                        length = tensors.get_slice(key).get_shape()[0]
                        run = Run(key, int(start), int(start) + length)
                        self._runs.setdefault((state, name), []).append((file, run))
        return self._runs

    @contextmanager
    def _opened(self, file: str) -> Iterator[Any]:
        with safe_open(self.folder.local_path(file), framework="pt") as tensors:
            yield tensors


class Checkpoints:
    """The checkpoints of one training run."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def write_share(self, step: int, rank: int, world_size: int, owned: Iterable[Share]) -> tuple[str, str]:
        """One rank's part. Returns the file's name and sha256, for the marker."""
        tensors = {
            f"{state}/{share.name}@{share.start}": tensor.detach().cpu().contiguous()
            for share in owned
            if share.written
            for state, tensor in share.tensors.items()
        }
        # safetensors orders by name only within a dtype and size; a sorted dict makes the bytes a function of content.
        data = save(dict(sorted(tensors.items())))
        name = f"rank-{rank:05d}-of-{world_size:05d}.safetensors"
        self._at(step).write(name, data)
        return name, sha256_bytes(data)

    def complete(self, step: int, files: dict[str, str], *, trained: dict[str, Any], history: History) -> None:
        """Make it a checkpoint, once every rank's part is there; then drop those before the last two."""
        columns = {name: torch.tensor([row[name] for row in history], dtype=torch.float64) for name in history[0]}
        curve = save(columns)
        self._at(step).write(HISTORY, curve)
        files = {**files, HISTORY: sha256_bytes(curve)}
        marker = {"format": FORMAT, "step": step, "files": files, "trained": trained}
        self._at(step).write(MARKER, canonical_json(marker))
        for old in self.steps()[:-KEPT]:
            self._at(old).delete(MARKER)  # first, so that a kill between the two leaves no half checkpoint
            self._at(old).delete()

    def steps(self) -> list[int]:
        """Steps of which there is a folder, complete or not, ascending."""
        names = (name.removeprefix(PREFIX) for name in self.folder.names() if name.startswith(PREFIX))
        return sorted(int(name) for name in names if name.isdigit())

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole checkpoint, and why newer ones were passed over."""
        passed_over: list[str] = []
        for step in reversed(self.steps()):
            folder = self._at(step)
            reason = _fault(folder)
            if reason is None:
                return self.open(step), passed_over
            passed_over.append(f"{folder.uri}: {reason}")
            folder.delete(MARKER)  # it will be written again, and must not look complete halfway
        return None, passed_over

    def open(self, step: int) -> Checkpoint:
        folder = self._at(step)
        return Checkpoint(folder, json.loads(folder.read(MARKER)))

    def delete(self) -> None:
        for step in self.steps():
            self._at(step).delete()

    def _at(self, step: int) -> Folder:
        return self.folder / f"{PREFIX}{step:08d}"


def _fault(folder: Folder) -> str | None:
    """Why the folder is no checkpoint to go on from, or None where it is one."""
    if not folder.exists(MARKER):
        return "never completed"
    try:
        marker = json.loads(folder.read(MARKER))
        if marker["format"] > FORMAT:
            return f"format {marker['format']}, and this version reads up to {FORMAT}"
        for name, sha256 in marker["files"].items():
            path: Path = folder.local_path(name)
            if sha256_file(path) != sha256:
                return f"{name} does not hash to what {MARKER} says"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{MARKER} is not readable"
    return None
