"""img2dataset's resizer by itself, under the interpreter that has img2dataset; needs nothing else but Python.

python -m benchmarks.ingest.peer_resizer laps FOLDER PROCESSES REPEATS     its laps over all pictures, as JSON
python -m benchmarks.ingest.peer_resizer encode FOLDER COUNT OUT           the first pictures as it stores them
"""

import io
import json
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.ingest.spread import Laps, in_processes

WARM = 16


def _resizer() -> Any:
    warnings.simplefilter("ignore")
    from img2dataset.resizer import Resizer

    return Resizer(image_size=256, resize_mode="center_crop", resize_only_if_bigger=False, encode_quality=95)


def laps(barrier: Any, paths: list[Path], repeats: int) -> Laps:
    resizer = _resizer()
    bodies = [path.read_bytes() for path in paths]
    for body in bodies[:WARM]:
        resizer(io.BytesIO(body))
    found = []
    for _ in range(repeats):
        barrier.wait()
        started, cpu = time.perf_counter(), time.process_time()
        for body in bodies:
            assert resizer(io.BytesIO(body))[-1] is None
        found.append((time.perf_counter() - started, time.process_time() - cpu))
    return found


def _encode(paths: list[Path], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    resizer = _resizer()
    for path in paths:
        stored, *_, error = resizer(io.BytesIO(path.read_bytes()))
        assert error is None, error
        (out / path.name).write_bytes(stored)


if __name__ == "__main__":
    what, folder, *rest = sys.argv[1:]
    pictures = sorted(Path(folder).glob("*.jpg"))
    if what == "laps":
        count, times = int(rest[0]), int(rest[1])
        print(
            json.dumps([asdict(lap) for lap in in_processes(laps, [pictures[k::count] for k in range(count)], times)])
        )
    else:
        _encode(pictures[: int(rest[0])], Path(rest[1]))
