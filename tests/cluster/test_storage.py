"""The three writes of the artifact protocol, on a disk and on an object store."""

import os
from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.storage import Folder


@pytest.fixture(params=["file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    found = Folder(tmp_path / "f") if request.param == "file" else Folder(f"memory://{tmp_path.name}/f")
    found.make()
    return found


def test_create_is_won_once(folder: Folder) -> None:
    assert [folder.create("a/b.json", text) for text in (b"1", b"2")] == [True, False]
    assert folder.read("a/b.json") == b"1"


def test_write_replaces_and_leaves_no_private_name(folder: Folder) -> None:
    folder.write("a", b"1")
    folder.write("a", b"2")
    assert (folder.read("a"), folder.names()) == (b"2", ["a"])


def test_settle_may_be_repeated(folder: Folder) -> None:
    folder.write("private", b"1")
    folder.settle("private", "public")
    folder.settle("private", "public")
    assert (folder.names(), folder.read("public")) == (["public"], b"1")


def test_settle_of_what_never_was_is_an_error(folder: Folder) -> None:
    with pytest.raises(FileNotFoundError):
        folder.settle("private", "public")


def test_names_of_a_missing_folder_are_none(folder: Folder) -> None:
    assert (folder / "missing").names() == []


def test_deleting_twice_is_deleting(folder: Folder) -> None:
    folder.write("a/b", b"1")
    folder.delete("a")
    folder.delete("a")
    assert not folder.exists("a/b")


def test_local_path_has_the_bytes(folder: Folder) -> None:
    folder.write("a/b.txt", b"1")
    assert folder.local_path("a/b.txt").read_bytes() == b"1"


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/run.*--out"):
        Folder(tmp_path / "file" / "run").make()


def test_an_unknown_protocol_is_the_users_to_mend() -> None:
    with pytest.raises(UserError, match="nosuch"):
        Folder("nosuch://bucket/run")


def test_folders_travel_to_other_processes(folder: Folder) -> None:
    import pickle

    assert pickle.loads(pickle.dumps(folder)).uri == folder.uri
    assert os.path.isabs(folder.uri) or "://" in folder.uri
