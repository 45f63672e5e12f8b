import asyncio
import hashlib
import io
import os
import signal
import subprocess
import sys
import textwrap
import time
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil
import pytest
import uvloop
from PIL import Image

from cluster.errors import UserError, WorkFailed
from ingest.children import Children
from ingest.decode import decode
from ingest.decode_config import DecodeConfig, FiltersConfig
from ingest.filters import Filters
from ingest.outcome import Decoded, Status

T = TypeVar("T")
FILTERS = """
import os, signal, time

def by_caption(pixels, url, caption):
    if caption == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if caption == "spin":
        while True: pass
    if caption == "sleep":
        time.sleep(1000)
    if caption == "slow":
        time.sleep(0.3)
    if caption.startswith("once "):
        try:
            os.mkdir(caption[5:])
            os.kill(os.getpid(), signal.SIGSEGV)
        except FileExistsError:
            pass

def pair_crashes(url, caption):
    by_caption(None, url, caption)
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages with one in it, on our path and on that of the children."""
    folder = tmp_path / "site"
    about = folder / "dangerous-1.2.dist-info"
    about.mkdir(parents=True)
    (folder / "dangerous.py").write_text(FILTERS)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: dangerous\nVersion: 1.2\n")
    (about / "INSTALLER").write_text("pip\n")
    (about / "top_level.txt").write_text("dangerous\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    return folder


def dangerous(**changed: object) -> DecodeConfig:
    filters = FiltersConfig(picture_filters=("dangerous:by_caption",), pair_filters=("dangerous:pair_crashes",))
    return DecodeConfig(**{"size": 32, "filters": filters, **changed})  # type: ignore[arg-type]


def jpeg(seed: int = 0, side: int = 64) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def vast_png(side: int, colour: int = 2) -> bytes:
    """Few bytes, and side × side pixels: RGB (2) or RGBA (6)."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, colour, 0, 0, 0])
    row, packer = b"\0" + b"\x7f" * {2: 3, 6: 4}[colour] * side, zlib.compressobj(1)
    rows = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def with_children(config: DecodeConfig, work: Callable[[Children], Awaitable[T]], loop: str = "uvloop") -> T:
    async def inside() -> T:
        async with Children(config) as children:
            return await work(children)

    factory = uvloop.new_event_loop if loop == "uvloop" else None
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(inside())


def ends(decoded: list[Decoded]) -> list[tuple[Status, str | None]]:
    return [(each.outcome.status, each.outcome.reason) for each in decoded]


def own_children() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if "ingest.child" in " ".join(each.cmdline())]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_children_answer_what_the_decoder_answers_in_the_order_asked(loop: str):
    config = DecodeConfig(size=32, decode_processes=2)
    bodies = [jpeg(seed) for seed in range(40)] + [b"<html>", b"", jpeg()[:500]]

    async def work(children: Children) -> list[Decoded]:
        return await asyncio.gather(*(children.decode(body, "u", "c") for body in bodies))

    assert with_children(config, work, loop) == [decode(body, config, Filters(config.filters, {})) for body in bodies]
    assert not own_children()


def test_bodies_and_pictures_larger_than_a_pipe_go_through():
    config = DecodeConfig(size=1024, format="png")
    body = jpeg(1, 2500)
    assert len(body) > 3_000_000

    async def work(children: Children) -> list[Decoded]:
        return await asyncio.gather(*(children.decode(body, "u" * 5000, "c" * 1_000_000) for _ in range(4)))

    wanted = decode(body, config, Filters(config.filters, {}))
    assert wanted.data is not None and len(wanted.data) > 1 << 20
    assert with_children(config, work) == [wanted] * 4


def test_a_crash_costs_its_row_and_no_other(site: Path):
    captions = ["fine"] * 5 + ["crash"] + ["fine"] * 5 + ["crash"] + ["fine"] * 5
    body = jpeg()

    async def work(children: Children) -> tuple[list[Decoded], int]:
        decoded = await asyncio.gather(*(children.decode(body, "u", caption) for caption in captions))
        again = await children.decode(body, "u", "fine")
        return [*decoded, again], children.replaced

    decoded, replaced = with_children(dangerous(), work)
    wanted = {"fine": (Status.OK, None), "crash": (Status.UNDECODABLE, "decoder_crashed")}
    assert ends(decoded) == [*(wanted[caption] for caption in captions), (Status.OK, None)]
    assert decoded[5].outcome.image_sha256 == hashlib.sha256(body).hexdigest()
    assert replaced == 4  # a picture is given up at the second death that it was there for


def test_a_picture_that_was_at_work_when_its_child_died_is_tried_once_more(site: Path, tmp_path: Path):
    async def work(children: Children) -> tuple[list[Decoded], int]:
        captions = ["fine", f"once {tmp_path / 'died'}", "fine"]
        return await asyncio.gather(*(children.decode(jpeg(), "u", caption) for caption in captions)), children.replaced

    decoded, replaced = with_children(dangerous(), work)
    assert ends(decoded) == [(Status.OK, None)] * 3 and replaced == 1


@pytest.mark.parametrize("caption", ["spin", "sleep"])
def test_a_picture_that_never_ends_costs_its_row_and_its_deadline(site: Path, caption: str):
    async def work(children: Children) -> list[Decoded]:
        captions = ["fine", caption, "fine", "slow", "fine"]
        return await asyncio.gather(*(children.decode(jpeg(), "u", each) for each in captions))

    begun = time.monotonic()
    decoded = with_children(dangerous(decode_deadline_s=0.4), work)
    assert ends(decoded) == [
        (Status.OK, None),
        (Status.UNDECODABLE, "decoder_timeout"),
        (Status.OK, None),
        (Status.OK, None),
        (Status.OK, None),
    ]
    assert time.monotonic() - begun < 20


def test_a_picture_that_needs_too_much_memory_is_told_and_the_child_lives():
    config = DecodeConfig(size=32, decode_memory_bytes=100_000_000)

    async def work(children: Children) -> tuple[list[Decoded], int]:
        bodies = [jpeg(), vast_png(6000), jpeg(), vast_png(1000)]
        return await asyncio.gather(*(children.decode(body, "u", "c") for body in bodies)), children.replaced

    decoded, replaced = with_children(config, work)
    assert ends(decoded) == [(Status.OK, None), (Status.UNDECODABLE, "memory"), (Status.OK, None), (Status.OK, None)]
    assert replaced == 0


def test_a_jpeg_of_endless_scans_costs_its_row_and_its_deadline():
    file = io.BytesIO()
    Image.new("RGB", (3000, 3000)).save(file, "JPEG", progressive=True)
    body = file.getvalue()
    last_scan = body[body.rindex(b"\xff\xda") : -2]
    endless = body[:-2] + last_scan * 3000 + body[-2:]

    async def work(children: Children) -> list[Decoded]:
        return await asyncio.gather(*(children.decode(each, "u", "c") for each in (jpeg(), endless, jpeg())))

    decoded = with_children(DecodeConfig(size=32, decode_deadline_s=0.5), work)
    assert ends(decoded) == [(Status.OK, None), (Status.UNDECODABLE, "decoder_timeout"), (Status.OK, None)]


@pytest.mark.slow
def test_the_largest_picture_allowed_leaves_room_for_the_worker():
    """Of 1.5 GB, 800 MB are the child's."""

    async def work(children: Children) -> tuple[list[Decoded], int]:
        (child,) = own_children()
        decoded = await children.decode(vast_png(9990, colour=6), "u", "c")
        lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        return [decoded], next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    decoded, peak = with_children(DecodeConfig(), work)
    assert ends(decoded) == [(Status.OK, None)]
    assert 9990**2 * 4 < peak < 800_000_000


@pytest.mark.slow
def test_mutated_pictures_leave_every_child_alive():
    random = np.random.default_rng(5)
    originals = []
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(file, kind)
        originals.append(file.getvalue())
    bodies = []
    for _ in range(400):
        body = bytearray(originals[random.integers(len(originals))])
        for _ in range(random.integers(1, 8)):
            place = int(random.integers(len(body)) * random.random())  # headers more often than data
            body[place] = int(random.integers(256))
        if random.random() < 0.2:
            del body[random.integers(1, len(body)) :]
        bodies.append(bytes(body))

    async def work(children: Children) -> tuple[list[Decoded], int]:
        return await asyncio.gather(*(children.decode(body, "u", "c") for body in bodies)), children.replaced

    decoded, replaced = with_children(DecodeConfig(size=32, decode_processes=2, max_pixels=1_000_000), work)
    assert replaced == 0
    assert {each.outcome.status for each in decoded} >= {Status.OK, Status.UNDECODABLE}
    for each in decoded:
        assert (each.data is None) == (each.outcome.status != Status.OK)
        assert each.data is None or Image.open(io.BytesIO(each.data)).size == (32, 32)


def test_a_child_that_is_killed_from_outside_costs_nothing(site: Path):
    async def work(children: Children) -> tuple[list[Decoded], int]:
        captions = ["slow"] * 6
        tasks = [asyncio.create_task(children.decode(jpeg(), "u", caption)) for caption in captions]
        await asyncio.sleep(0.1)
        for each in own_children():
            each.send_signal(signal.SIGKILL)
        return await asyncio.gather(*tasks), children.replaced

    decoded, replaced = with_children(dangerous(decode_processes=2), work)
    assert ends(decoded) == [(Status.OK, None)] * 6 and replaced == 2


def test_pairs_are_judged_one_by_one_where_one_of_them_kills_its_judge(site: Path):
    pairs = [("u", f"caption {number}") for number in range(600)]
    pairs[300] = ("u", "crash")
    pairs[301] = ("u", "spin")

    async def work(children: Children) -> list[str | None]:
        return await children.judge(pairs)

    judged = with_children(dangerous(decode_deadline_s=0.5, decode_processes=2), work)
    assert {place: reason for place, reason in enumerate(judged) if reason} == {
        300: "filter_crashed",
        301: "filter_timeout",
    }


def test_pairs_are_judged_by_the_filters_that_are_on():
    config = DecodeConfig(filters=FiltersConfig(min_caption_characters=3))

    async def work(children: Children) -> list[str | None]:
        return await children.judge([("u", "ab"), ("u", "abc"), ("u", "\udc80\0"), ("u", "x" * 1_000_000)])

    assert with_children(config, work) == ["caption_too_short", None, "caption_too_short", None]


def test_a_caller_that_goes_away_disturbs_nobody(site: Path):
    async def work(children: Children) -> list[Decoded]:
        tasks = [asyncio.create_task(children.decode(jpeg(), "u", "slow")) for _ in range(6)]
        await asyncio.sleep(0.1)
        for task in tasks[::2]:
            task.cancel()
        return await asyncio.gather(*tasks[1::2])

    assert ends(with_children(dangerous(), work)) == [(Status.OK, None)] * 3


def test_what_a_user_must_put_right_is_said_at_the_start():
    async def work(children: Children) -> None:
        raise AssertionError("must not start")

    with pytest.raises(UserError, match="'xx'"):
        with_children(DecodeConfig(filters=FiltersConfig(languages=("xx",))), work)
    with pytest.raises(UserError, match="no/such/list"):
        with_children(DecodeConfig(filters=FiltersConfig(blocked_urls="/no/such/list")), work)
    assert not own_children()


def test_children_that_cannot_start_fail_the_work_instead_of_looping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho libjpeg is missing >&2\nexit 3\n")
    broken.chmod(0o755)

    async def nothing(children: Children) -> None:
        raise AssertionError("must not start")

    async def breaks_later(children: Children) -> None:
        await children.decode(jpeg(), "u", "c")
        monkeypatch.setattr(sys, "executable", str(broken))
        own_children()[0].kill()
        for _ in range(2):
            with pytest.raises(WorkFailed, match=r"code 3.*libjpeg is missing"):
                await children.decode(jpeg(), "u", "c")

    with_children(DecodeConfig(size=32), breaks_later)
    with pytest.raises(WorkFailed, match="libjpeg is missing"):
        with_children(DecodeConfig(size=32), nothing)


def test_children_die_with_a_parent_that_is_killed(site: Path):
    script = """
        import asyncio, sys
        from ingest.children import Children
        from ingest.decode_config import DecodeConfig, FiltersConfig

        async def main():
            filters = FiltersConfig(picture_filters=("dangerous:by_caption",))
            async with Children(DecodeConfig(size=32, decode_processes=2, filters=filters)) as children:
                task = asyncio.create_task(children.decode(open(sys.argv[1], "rb").read(), "u", "sleep"))
                await asyncio.sleep(0.2)
                print("busy", flush=True)
                await task

        asyncio.run(main())
    """
    picture = site / "picture.jpg"
    picture.write_bytes(jpeg())
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(picture)], stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None and parent.stdout.readline() == "busy\n"
        children = psutil.Process(parent.pid).children()
        assert len(children) == 2
        os.kill(parent.pid, signal.SIGKILL)
    gone, alive = psutil.wait_procs(children, timeout=5)
    assert not alive and len(gone) == 2
