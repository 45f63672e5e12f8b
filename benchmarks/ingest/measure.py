"""All measurements, one after another, on one server and one set of pictures.

Nothing runs beside what is measured but the server. Runs whose memory is sampled are extra ones: sampling costs time.
"""

import os
import random
import statistics
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.ingest.figures import Figures
from benchmarks.ingest.floors import decode_ours, fetch_bare, fetch_ours
from benchmarks.ingest.ours import ACTORS, OurRun, run_ours, write_recipe
from benchmarks.ingest.peer import PROCESSES, peer_laps, peer_pictures, run_peer
from benchmarks.ingest.pictures import make_pictures
from benchmarks.ingest.processes import run_command
from benchmarks.ingest.quality import compare
from benchmarks.ingest.server import PictureServer
from benchmarks.ingest.spread import Lap, in_processes

AT_ONCE = 256  # requests of one process: img2dataset's default number of threads
FEW_AT_ONCE = 16  # where img2dataset is fastest against a server that answers at once
DELAY_MS = 200
FLOOR_LAPS = 2  # of each floor, beside each run
DEAD_SHARE = 0.3
DEAD_BUFFER_BYTES = 8_000_000  # so that pictures are not asked for much before they are decoded
NAP_S = 4


@dataclass(frozen=True)
class Scale:
    rows: int
    shard_rows: int
    repeats: int
    floor_repeats: int
    sample: int


class Bench:
    """`python`: the interpreter that has img2dataset, or None to leave it out."""

    def __init__(self, folder: Path, scale: Scale, python: str | None) -> None:
        self._folder = folder
        self._scale = scale
        self._python = python
        self._pictures = folder / "pictures"
        self._figures = Figures(os.cpu_count() or 1)

    def run(self) -> Figures:
        with _told("pictures"):
            make_pictures(self._pictures, self._scale.rows)
        paths = sorted(self._pictures.glob("*.jpg"))
        self._figures.add("pictures.bytes", "a picture's file", "kB", [path.stat().st_size / 1000 for path in paths])
        with PictureServer(self._pictures) as server:
            self._server = server
            self._table = self._write_table("plain", [server.url(number) for number in range(self._scale.rows)])
            for measure in (self._runs, self._memory, self._floors, self._quality, self._latency, self._dead):
                with _told(measure.__name__.strip("_")):
                    measure()
        return self._figures

    def _runs(self) -> None:
        """Theirs, ours and the floors in turn, so that a drift of the machine meets all of them."""
        scale, add = self._scale, self._figures.add
        paths = sorted(self._pictures.glob("*.jpg"))
        urls = [self._server.url(number) for number in range(scale.rows)]
        decoding: list[Lap] = []
        fetching: list[Lap] = []
        ours: list[OurRun] = []
        peers: dict[int, list[Any]] = {AT_ONCE: [], FEW_AT_ONCE: []}
        server_ms: list[float] = []
        for repeat in range(scale.repeats):
            for threads in peers if self._python and repeat == 0 else [AT_ONCE] if self._python else []:
                peers[threads].append(self._peer_run(self._table, threads=threads))
            before = self._server.cpu_s()
            ours.append(self._our_run(self._table, concurrency=AT_ONCE))
            server_ms.append((self._server.cpu_s() - before) * 1000 / scale.rows)
            decoding += self._decode_laps(paths, FLOOR_LAPS)
            fetching += in_processes(fetch_ours, [urls], self._fetch_settings(), AT_ONCE, FLOOR_LAPS)
        if self._python:
            many, few = peers[AT_ONCE], peers[FEW_AT_ONCE]
            add("peer.shard_rate", "img2dataset, in its shards", "images/s", [run.shard_rate for run in many])
            add("peer.few", f"… with {FEW_AT_ONCE} threads a process", "images/s", [run.shard_rate for run in few])
            add("peer.rate", "img2dataset, the whole command", "images/s", [run.command_rate for run in many])
        add("ours.shard_rate", "unclip, in its shards", "images/s", [run.shard_rate for run in ours])
        add("ours.rate", "unclip, the whole command", "images/s", [run.command_rate for run in ours])
        add("ours.first_receipt", "unclip, start to first shard", "s", [run.first_receipt_s for run in ours])
        add("ours.server_ms", "the server's CPU time in our runs", "core-ms/image", server_ms)
        self._add_decode("floor.decode", "our decoder alone", decoding)
        rates = [scale.rows / lap.seconds for lap in fetching]
        add("floor.fetch.rate", "our fetcher alone, one process", "images/s", rates)
        cpu_ms = [lap.cpu_s * 1000 / scale.rows for lap in fetching]
        add("floor.fetch.core_ms", "our fetcher alone", "core-ms/image", cpu_ms)

    def _memory(self) -> None:
        add = self._figures.add
        if self._python:
            peak = self._peer_run(self._table, threads=AT_ONCE, memory=True).peak_bytes
            add("peer.peak", "img2dataset, peak memory", "bytes", [peak])
        add("ours.peak", "unclip, peak memory", "bytes", [self._our_run(self._table, memory=True).peak_bytes])
        nap = [sys.executable, "-m", "benchmarks.ingest.bare", str(NAP_S)]
        bare = run_command(nap, self._folder / "bare.log", memory=True)
        add("bare.peak", f"a bare Ray session with {ACTORS} idle actors", "bytes", [bare.peak_bytes])

    def _floors(self) -> None:
        scale, add = self._scale, self._figures.add
        urls = [self._server.url(number) for number in range(scale.rows)]
        if self._python:
            laps = peer_laps(self._python, self._pictures, scale.floor_repeats)
            self._add_decode("floor.peer", "img2dataset's resizer alone", laps)
        odd = self._folder / "odd"  # a side below twice the size: no decoding at half size
        make_pictures(odd, scale.rows // 4, side=480)
        rates = [
            scale.rows // 4 / lap.seconds for lap in self._decode_laps(sorted(odd.glob("*.jpg")), scale.floor_repeats)
        ]
        add("floor.odd.rate", "our decoder alone, pictures of 480 px", "images/s", rates)
        laps = in_processes(fetch_bare, [urls], AT_ONCE, scale.floor_repeats)
        add(
            "floor.bare.rate", "a bare HTTP client, one process", "images/s", [scale.rows / lap.seconds for lap in laps]
        )
        cpu_ms = [lap.cpu_s * 1000 / scale.rows for lap in laps]
        add("floor.bare.core_ms", "a bare HTTP client", "core-ms/image", cpu_ms)

    def _decode_laps(self, paths: list[Path], laps: int) -> list[Lap]:
        shares = [paths[rank::PROCESSES] for rank in range(PROCESSES)]
        return in_processes(decode_ours, shares, {"size": 256}, laps)

    def _add_decode(self, key: str, what: str, laps: list[Lap]) -> None:
        rows = self._scale.rows
        rates = [rows / lap.seconds for lap in laps]
        self._figures.add(f"{key}.rate", f"{what}, {PROCESSES} processes", "images/s", rates)
        core_ms = [lap.seconds * PROCESSES * 1000 / rows for lap in laps]
        self._figures.add(f"{key}.core_ms", what, "core-ms/image", core_ms)

    def _quality(self) -> None:
        if not self._python:
            return
        add = self._figures.add
        paths = sorted(self._pictures.glob("*.jpg"))[: self._scale.sample]
        peer_pictures(self._python, self._pictures, len(paths), self._folder / "stored")
        found = compare(paths, self._folder / "stored")
        sides = {"ours": ("unclip", found.ours_stored), "peer": ("img2dataset", found.peer_stored)}
        for key, (name, quality) in sides.items():
            add(f"quality.{key}.bytes", f"{name}, stored picture at quality 95", "kB", [quality.bytes / 1000])
            add(f"quality.{key}.psnr", f"{name}, PSNR", "dB", [quality.psnr_db])
            add(f"quality.{key}.ssim", f"{name}, SSIM", "", [quality.ssim])
        same, peer = found.ours_same_size, found.peer_stored
        add("quality.same.psnr", "unclip at img2dataset's file size, PSNR", "dB", [same.psnr_db])
        add("quality.same.ssim", "unclip at img2dataset's file size, SSIM", "", [same.ssim])
        add("quality.psnr_lead", "… above img2dataset's", "dB", [same.psnr_db - peer.psnr_db])
        add("quality.ssim_lead", "… above img2dataset's", "", [same.ssim - peer.ssim])

    def _latency(self) -> None:
        """Every answer comes 200 ms late. Requests in flight as the server counts them: read and not yet answered."""
        scale, server = self._scale, self._server
        hosts = [f"127.1.0.{number}" for number in range(1, 251)]  # no host is asked for everything at once
        urls = [server.url(number, host=hosts[number % len(hosts)], delay_ms=DELAY_MS) for number in range(scale.rows)]
        table = self._write_table("late", urls)
        server.take()
        run = self._our_run(table)
        self._add_latency("ours", "unclip, whole run", run.shard_rate)
        halves = [urls[rank::ACTORS] * 3 for rank in range(ACTORS)]
        server.take()
        (lap,) = in_processes(fetch_ours, halves, self._fetch_settings(), 1024, 1)
        self._add_latency("fetch", f"our fetcher alone, {ACTORS} processes", 3 * scale.rows / lap.seconds)
        if self._python:
            server.take()
            self._add_latency("peer", "img2dataset, whole run", self._peer_run(table, threads=AT_ONCE).shard_rate)

    def _add_latency(self, key: str, what: str, rate: float) -> None:
        seen, cores = self._server.take(), self._figures.cores
        last = max(seen["requests"])
        # The end of a run, when nothing is left to be asked for, says nothing about how much is asked at once.
        in_flight = [number / cores for at, number in seen["samples"] if at <= last]
        self._figures.add(f"latency.{key}.rate", what, "images/s", [rate])
        self._figures.add(
            f"latency.{key}.in_flight", f"{what}, in flight, median", "a core", [statistics.median(in_flight)]
        )
        self._figures.add(f"latency.{key}.peak", f"{what}, in flight, peak", "a core", [seen["peak"] / cores])

    def _dead(self) -> None:
        """The same living rows, alone and among dead ones: how fast 99% of the living are answered, from the first."""
        living = [self._server.url(number) for number in range(self._scale.rows)]
        dead_rows = round(len(living) * DEAD_SHARE / (1 - DEAD_SHARE))
        dead = [
            self._server.url(0, host=f"127.{64 + n // 60000}.{n // 250 % 240}.{1 + n % 250}") for n in range(dead_rows)
        ]
        mixed = living + dead
        random.Random(0).shuffle(mixed)
        tables = {"without": self._write_table("living", living), "with": self._write_table("mixed", mixed)}
        for key, table in tables.items():
            what = f"living rows {key} dead hosts among them"
            rates = [self._living_rate(table) for _ in range(2 if self._scale.repeats > 1 else 1)]
            self._figures.add(f"dead.ours.{key}", what, "images/s", rates)

    def _living_rate(self, table: Path) -> float:
        self._server.take()
        self._our_run(table, buffered_bytes=DEAD_BUFFER_BYTES)
        answers = sorted(self._server.take()["answers"])
        served = answers[: round(self._scale.rows * 0.99)]
        return len(served) / (served[-1] - served[0])

    def _our_run(self, table: Path, *, memory: bool = False, **images: Any) -> OurRun:
        recipe = self._folder / "recipe.yaml"
        write_recipe(recipe, table, self._scale.shard_rows, **images)
        run = run_ours(recipe, self._folder / "ours", memory=memory)
        if run.stored != self._scale.rows:
            raise RuntimeError(f"unclip stored {run.stored} of {self._scale.rows} pictures: {run.reasons}")
        return run

    def _peer_run(self, table: Path, *, threads: int, memory: bool = False) -> Any:
        scale, out = self._scale, self._folder / "peer"
        assert self._python is not None
        run = run_peer(self._python, table, out, scale.rows, scale.shard_rows, threads=threads, memory=memory)
        if run.stored != scale.rows:
            raise RuntimeError(f"img2dataset stored {run.stored} of {scale.rows} pictures")
        return run

    def _fetch_settings(self) -> dict[str, Any]:
        return {"allow_networks": ["127.0.0.0/8"]}

    def _write_table(self, name: str, urls: list[str]) -> Path:
        path = self._folder / f"{name}.parquet"
        captions = [f"picture {number}" for number in range(len(urls))]
        pq.write_table(pa.table({"url": urls, "caption": captions}), path)
        return path


@contextmanager
def _told(what: str) -> Any:
    started = time.monotonic()
    print(f"{what} …", file=sys.stderr, flush=True)
    yield
    print(f"{what}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
