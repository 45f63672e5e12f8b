"""Every kind of trouble at once, among good rows, through a real worker: each row ends as the corpus says it must."""

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.artifact import Artifact
from cluster.workshop import Workshop
from ingest.partition import build_pairs
from ingest.sources import SourceBatch
from tests.ingest.hostile_bytes import JPEG
from tests.ingest.hostile_kinds import NAMES, Kind, kinds
from tests.ingest.hostile_web import NETWORK, HostileWeb, hostile_web, ok

pytestmark = pytest.mark.slow

SHARDS, GOOD_ROWS = 3, 60
DEADLINE_S, MAX_RSS = 4.0, 1_500_000_000
SETTINGS: dict[str, Any] = {
    "size": 64, "deadline_s": DEADLINE_S, "min_rate_after_s": 1.0, "attempts": 2, "backoff_s": 0.05,
    "host_patience_s": 1.0, "host_cooldown_s": 0.2, "decode_deadline_s": 1.0, "shards_in_flight": SHARDS,
}  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """What a run over the corpus left."""

    rows: list[Kind]
    ledger: dict[int, dict[str, Any]]  # by the row's place in the source
    results: list[dict[str, Any]]
    web: HostileWeb
    seconds: float
    peak_rss: int
    images: Artifact
    complaints: str


class Rows:
    """The corpus and the good rows in one shuffled table."""

    def __init__(self, rows: list[Kind], urls: list[bytes | None]) -> None:
        self._rows, self._urls = rows, urls

    def batches(self) -> Iterator[SourceBatch]:
        yield SourceBatch("rows", 0, self._urls, [kind.caption for kind in self._rows])


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    from cluster.artifact import Request
    from cluster.storage import Folder
    from cluster.workshop import begin

    folder = tmp_path_factory.mktemp("adversarial")
    good = [Kind(f"good_{n}", "ok", None, [ok(JPEG)], caption=b"good %d" % n) for n in range(GOOD_ROWS)]
    rows = [*kinds(), *good]
    random.Random(0).shuffle(rows)
    scripts = {f"/{kind.name}": kind.answer for kind in rows if kind.answer is not None}
    scripts |= {"tls": [b"this is not TLS\r\n\r\n"], "/again": [ok(JPEG)]}
    with hostile_web(scripts) as web:
        hosts = {kind.name: f"127.0.1.{1 + index}" for index, kind in enumerate(kinds())}
        hosts |= {kind.name: f"127.0.1.{210 + index % 30}" for index, kind in enumerate(good)}
        urls = [kind.url_bytes(hosts[kind.name], web.port, web.canary_port) for kind in rows]
        shops: dict[str, Workshop] = {
            name: begin(Folder(folder / name), Request(name, 1, {}, {}), {}) for name in ("pairs", "images")
        }
        per_shard = -(-len(rows) // SHARDS)
        pairs = shops["pairs"].publish(
            build_pairs(Rows(rows, urls), shops["pairs"], shard_rows=per_shard)["shards"]  # type: ignore[arg-type]
        )
        settings = {**SETTINGS, "shard_rows": per_shard, "allow_networks": [f"{NETWORK}:{web.port}"]}
        tasks = [
            {
                "shard": entry.shard, "rows": entry.rows, "pairs": pairs.uri, "out": shops["images"].plain(),
                "made_from": "", "pictures": None, "retry": None,
            }
            for entry in pairs.shards
        ]  # fmt: skip
        names = {name: [addresses] for name, addresses in NAMES.items()}
        names["rebinding.test"] = [["127.0.1.202"], ["127.0.0.1"]]
        started = time.monotonic()
        results, peak, complaints = work({"settings": settings, "tasks": tasks, "names": names})
        seconds = time.monotonic() - started
        images = shops["images"].publish(len(tasks))
        ledger = pa.concat_tables(pq.read_table(images.file(f"{shard:08d}.parquet")) for shard in range(len(tasks)))
        by_row = {row["source_row"]: row for row in ledger.to_pylist()}
        assert ledger.num_rows == len(by_row)
        yield Ran(rows, by_row, results, web, seconds, peak, images, complaints)


def work(wanted: dict[str, Any]) -> tuple[list[dict[str, Any]], int, str]:
    """A worker's results, the highest memory of it and its children together, and what it said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.ingest.hostile_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    peak, ended = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        worker = psutil.Process(process.pid)
        while not ended.wait(0.1):
            try:
                family = [worker, *worker.children(recursive=True)]
                peak = max(peak, sum(each.memory_info().rss for each in family))
            except psutil.Error:
                continue

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        said, complaints = process.communicate(json.dumps(wanted), timeout=120)
    finally:
        ended.set()
        sampler.join()
        process.kill()
    assert process.returncode == 0, complaints[-4000:]
    return json.loads(said), peak, complaints


def test_the_corpus_has_kinds_enough_each_with_a_name_and_a_host_of_its_own():
    names = [kind.name for kind in kinds()]
    assert 60 <= len(names) == len(set(names)) < 200


def test_every_kind_ends_as_it_must(ran: Ran):
    ended = {kind.name: (ran.ledger[row]["status"], ran.ledger[row]["reason"]) for row, kind in enumerate(ran.rows)}
    wanted = {kind.name: (kind.status, kind.reason) for kind in ran.rows}
    differing = {name: (ended[name], wanted[name]) for name in wanted if ended[name] != wanted[name]}
    assert differing == {}


def test_every_row_is_in_the_ledger_once_and_counted(ran: Ran):
    assert sorted(ran.ledger) == list(range(len(ran.rows)))
    assert sum(result["rows"] for result in ran.results) == len(ran.rows)
    assert sum(sum(result["counts"].values()) for result in ran.results) == len(ran.rows)
    assert sum(ran.images.manifest.totals["counts"].values()) == len(ran.rows)


def test_hostile_captions_are_kept_letter_by_letter(ran: Ran):
    for row, kind in enumerate(ran.rows):
        entry = ran.ledger[row]
        kept = entry["caption_bytes"] if entry["caption"] is None else entry["caption"].encode()
        assert kept == kind.caption, kind.name


def test_nobody_outside_the_allowed_network_was_contacted(ran: Ran):
    assert ran.web.canary_contacts == []
    assert ran.web.requests["/name_rebinding"] == 1 <= ran.web.requests["/again"]
    assert not any(b"secret" in head or b"Authorization" in head for head in ran.web.heads)


def test_the_canary_sings_when_it_is_contacted(ran: Ran):
    import socket

    for address, port in (("127.0.0.1", ran.web.port), ("127.0.1.1", ran.web.canary_port)):
        with socket.create_connection((address, port), timeout=5):
            pass
    deadline = time.monotonic() + 5
    while len(ran.web.canary_contacts) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(ran.web.canary_contacts) == 2
    ran.web.canary_contacts.clear()


def test_nothing_holds_the_worker_beyond_its_deadlines(ran: Ran):
    # start-up and decoding of the bombs stand beside the deadline of the slowest row
    print(f"{len(ran.rows)} rows in {ran.seconds:.1f} s, peak {ran.peak_rss / 1e6:.0f} MB")
    assert ran.seconds < DEADLINE_S + 20


def test_worker_and_children_stay_small(ran: Ran):
    assert 0 < ran.peak_rss < MAX_RSS


def test_no_defect_of_ours_hides_behind_a_row(ran: Ran):
    assert [row for row in ran.ledger.values() if row["reason"] == "internal_error"] == []
    assert "Traceback" not in ran.complaints, ran.complaints[-3000:]
