"""The tower: imports point down only, and each heavy library lives on its own floor."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOWER = ["pipeline", "train", "embed", "ingest", "cluster"]
HOME = {"ray": "cluster", "deepspeed": "train", "open_clip": "embed", "faiss": "embed"}
LIGHT = ("ray", "torch", "deepspeed", "open_clip", "faiss", "matplotlib")


def modules() -> list[Path]:
    return [path for folder in TOWER for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module or ""


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_and_libraries_stay_home(path: Path) -> None:
    floor = TOWER.index(path.relative_to(ROOT).parts[0])
    for name in imported(path):
        top = name.split(".")[0]
        assert top not in TOWER[:floor], f"{name} is a floor above"
        assert HOME.get(top, TOWER[floor]) == TOWER[floor], f"{top} lives in {HOME[top]}/"


@pytest.mark.parametrize(
    "module",
    ["pipeline.cli", "pipeline.config", "pipeline.drive", "pipeline.status", "train.config", "train.families.config"],
)
def test_what_must_start_in_a_blink_loads_no_heavy_library(module: str) -> None:
    code = f"import {module}, sys; print(*[name for name in {LIGHT!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found == []


def test_rooms_stay_liveable() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules()}
    assert [name for name, length in lengths.items() if length > 400] == []
    assert not [path for path in modules() if path.stem in ("utils", "helpers", "common")]
    assert not [path for path in modules() if len(path.relative_to(ROOT).parts) > 3]
