"""The protocol over a real S3 API on loopback: many writers, stale listings, refusals, lost answers, kills."""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.artifact import Artifact
from cluster.check import find_faults
from cluster.environment import environment
from cluster.errors import UserError
from cluster.garbage import collect, delete
from cluster.lease import Lease, LeaseHeld
from cluster.storage import Folder
from cluster.workshop import begin
from tests.cluster.protocol_steps import ONE_THREAD
from tests.cluster.shard_worker import REQUEST, commit

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SHARDS = 3
Faults = Callable[..., int]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The endpoint; credentials and patience come from the environment, as they do for people."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.s3_server"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    endpoint = f"http://127.0.0.1:{process.stdout.readline().strip()}"
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "an-id",
        "AWS_SECRET_ACCESS_KEY": "hush-hush",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "2",
    }
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # one that another module used knows that module's server
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)
            s3fs.S3FileSystem().mkdir("bucket")
            yield endpoint
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def folder(server: str) -> Folder:
    return Folder(f"s3://bucket/{uuid.uuid4().hex[:8]}/images")


@pytest.fixture
def faults(server: str) -> Iterator[Faults]:
    def plan(how: str, method: str = "", path: str = "", *, skip: int = 0, times: int = 1) -> int:
        body = {"how": how, "method": method, "path": path, "skip": skip, "times": times}
        request = urllib.request.Request(f"{server}/__faults__", json.dumps(body).encode(), method="POST")
        with urllib.request.urlopen(request) as answer:
            return int(json.load(answer)["requests"])

    yield plan
    plan("none")


def objects(folder: Folder) -> dict[str, bytes]:
    """All that is there, save receipts, which tell of hosts and times."""
    return {name: folder.read(name) for name in folder.files_below() if not name.startswith("receipts/")}


def build(folder: Folder, shards: int = SHARDS) -> Artifact:
    workshop = begin(folder, REQUEST, environment())
    workshop.recover()
    for shard in sorted(set(range(shards)) - workshop.committed()):
        commit(workshop, shard)
    return workshop.publish(shards)


def test_of_16_writers_at_once_exactly_one_creates(folder: Folder) -> None:
    for round_ in range(5):
        gate = threading.Barrier(16)

        def create(writer: int, name: str = f"receipts/{round_}.json", gate: threading.Barrier = gate) -> bool:
            gate.wait()
            return Folder(folder.uri).create(name, f"writer {writer}".encode())

        with ThreadPoolExecutor(16) as writers:
            won = list(writers.map(create, range(16)))
        assert won.count(True) == 1
        assert folder.read(f"receipts/{round_}.json") == f"writer {won.index(True)}".encode()


def test_the_bytes_are_those_of_a_local_build(folder: Folder, tmp_path: Path) -> None:
    artifact = build(folder)
    local = Folder(tmp_path / "images")
    build(local)
    assert objects(folder) == objects(local)
    assert list(find_faults(artifact)) == []
    assert artifact.file("00000001.txt").read_text().startswith("txt of shard 1")


def test_revisions_inherit_discard_and_leave_nothing_behind(folder: Folder) -> None:
    first = build(folder)
    second = begin(folder, REQUEST, environment(), amends={"retry": ["fetch_failed"]})
    commit(second, 1)
    second.discard(1)
    assert second.committed() == set()
    commit(second, 1)
    new = second.publish(SHARDS, inherit={shard: first.shards[shard] for shard in (0, 2)})
    assert list(find_faults(new)) == []
    delete(folder, collect(folder))
    assert collect(folder) == [] and list(find_faults(Artifact.open(folder))) == []
    assert sorted(objects(folder)) == [
        "00000000.tar",
        "00000000.txt",
        "00000001-r2.tar",
        "00000001-r2.txt",
        "00000002.tar",
        "00000002.txt",
        "manifest.json",
        "request-r2.json",
        "request.json",
        "shards-r2.parquet",
    ]


def test_what_another_process_writes_is_seen_at_once(folder: Folder) -> None:
    workshop = begin(folder, REQUEST, environment())
    code = (
        "import sys; from cluster.workshop import Workshop; from tests.cluster.shard_worker import commit\n"
        "[commit(Workshop(sys.argv[1], 1), int(shard)) for shard in sys.argv[2:]]"
    )
    for shard in range(2):
        assert workshop.committed() == set(range(shard)) and not folder.exists(f"0000000{shard}.tar")
        assert f"0000000{shard}.tar" not in folder.names() + folder.files_below()
        subprocess.run([sys.executable, "-c", code, folder.uri, str(shard)], cwd=ROOT, check=True)
        assert workshop.committed() == set(range(shard + 1)) and folder.exists(f"0000000{shard}.tar")
        assert folder.size(f"0000000{shard}.tar") > 0 and f"0000000{shard}.tar" in folder.names()


def test_one_driver_a_run(folder: Folder) -> None:
    with Lease(folder) as lease:
        with pytest.raises(LeaseHeld, match=f"process {os.getpid()}"), Lease(Folder(folder.uri)):
            pass
        lease.check()
    with Lease(folder) as lease:
        assert lease.number == 2


@pytest.mark.parametrize("how", ["500", "503", "lost"])
def test_a_refusal_or_a_lost_answer_costs_a_second_request_and_nothing_else(
    folder: Folder, faults: Faults, how: str
) -> None:
    places = [("PUT", ".staging/"), ("PUT", "receipts/"), ("PUT", "0.tar"), ("PUT", "manifest"), ("DELETE", "")]
    built = []
    for number, (method, path) in enumerate(places):
        faults(how, method, path)
        built.append(build(folder / str(number)))
        assert faults("none") > 0
    assert all(objects(artifact.folder) == objects(built[0].folder) for artifact in built)


@pytest.mark.parametrize(
    ("method", "path"),
    [("PUT", ".staging/"), ("PUT", "receipts/"), ("PUT", "/0000000"), ("DELETE", ""), ("PUT", "shards")],
)
@pytest.mark.parametrize("how", ["500", "lost"])
def test_a_store_that_stays_out_ends_the_build_soon_and_a_rerun_completes_it(
    folder: Folder, faults: Faults, how: str, method: str, path: str
) -> None:
    whole = objects(build(folder / "whole").folder)
    began = time.monotonic()
    faults(how, method, path, skip=int(path != "shards"), times=10_000)
    with pytest.raises(OSError) as told:
        build(folder / "images")
    assert "hush" not in str(told.value)
    requests = faults("none")
    assert time.monotonic() - began < 30 and requests < 150
    assert not (folder / "images").exists("manifest.json")
    artifact = build(folder / "images")
    assert objects(artifact.folder) == whole
    assert list(find_faults(artifact)) == []


def test_an_answer_cut_in_its_middle_is_read_again_or_refused_never_taken_for_whole(
    folder: Folder, faults: Faults
) -> None:
    folder.write("data", bytes(100_000))
    faults("cut", "GET", "data")
    assert folder.read("data") == bytes(100_000)
    faults("cut", "GET", "data", times=10_000)
    for read in (folder.read, folder.local_path):
        with pytest.raises(OSError):
            read("data")
    faults("none")
    assert folder.local_path("data").read_bytes() == bytes(100_000)


def test_killed_between_two_requests_a_build_goes_on_to_the_same_bytes(server: str) -> None:
    """Every fourth request: a fresh process needs a second to learn S3, and all 52 take minutes."""
    uri = f"s3://bucket/{uuid.uuid4().hex[:8]}"
    command = [sys.executable, "-m", "tests.cluster.protocol_steps", uri, "kill", "4", "3"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, env=os.environ | ONE_THREAD)
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["faults"] == []
    assert result["stopped"] * 4 >= result["steps"] > 40


def test_a_folder_in_use_works_in_a_forked_process_and_from_many_threads(folder: Folder) -> None:
    folder.write("data", b"bytes")
    with ThreadPoolExecutor(16) as readers:
        assert set(readers.map(lambda _: folder.read("data"), range(64))) == {b"bytes"}
    code = (
        "import os, sys; from cluster.storage import Folder\n"
        "folder = Folder(sys.argv[1]); folder.read('data'); child = os.fork()\n"
        "if child == 0: os._exit(folder.read('data') != b'bytes')\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code, folder.uri], cwd=ROOT, timeout=60).returncode == 0


def test_a_bucket_that_is_not_there_is_told_and_not_made(server: str) -> None:
    with pytest.raises(UserError, match=r"no bucket 'misspelled' is seen with the credentials.*--out"):
        Folder("s3://misspelled/run").make()
    assert not Folder("s3://misspelled").exists()


def test_credentials_in_a_uri_are_refused_and_not_repeated() -> None:
    with pytest.raises(UserError, match="environment") as told:
        Folder("s3://an-id:hush-hush@bucket/run")
    assert "hush" not in str(told.value)
