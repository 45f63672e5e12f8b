"""A process that decodes pictures and judges pairs, and whose death costs one row.

It lives in the middle of hostile bytes and native decoders, so the kernel holds its limits: memory beyond what it has
at rest (RLIMIT_AS), and CPU time for each job (a timer whose signal kills). It ends with its parent, whose death it
learns from the end of its input, or from the kernel while it is busy. Imported here is only what decoding needs.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import traceback
import warnings
from typing import Any

from cluster.errors import UserError
from ingest.decode import decode
from ingest.decode_config import DecodeConfig
from ingest.filters import Filters
from ingest.frames import IN_FRAME, JUDGE, LIST, SETTINGS, read_request, write_answer
from ingest.outcome import Outcome, Status
from ingest.tray import Tray

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """`sys.argv[1]` is the id of the process to work for, `sys.argv[2]` the descriptor of the tray's memory."""
    _die_with(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    # Answers go to a descriptor of their own, so that what a library prints does not land among them.
    answers = os.dup(1)
    os.dup2(2, 1)
    requests = os.fdopen(0, "rb", buffering=1 << 16)
    tray = Tray(int(sys.argv[2]))
    # Pillow warns about metadata that it cannot read; what a picture's row says is in the ledger.
    warnings.simplefilter("ignore")
    first = read_request(requests, tray)
    if first is None:
        return
    kind, body, *_ = first
    assert kind == SETTINGS
    plain = json.loads(body)
    config = DecodeConfig.model_validate(plain["config"])
    lists: dict[str, bytes] = {}
    for _ in range(plain["lists"]):
        frame = read_request(requests, tray)
        if frame is None:
            return
        assert frame[0] == LIST
        lists[frame[2]] = frame[1]
    try:
        filters = Filters(config.filters, lists)
    except UserError as error:
        write_answer(answers, {"wrong": str(error)})
        return
    del lists
    _limit_memory(config.decode_memory_bytes)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    write_answer(answers, {"ready": True})
    while (job := read_request(requests, tray)) is not None:
        kind, body, url, caption, place = job
        signal.setitimer(signal.ITIMER_PROF, config.decode_deadline_s)
        answer, data = _judged(body, filters) if kind == JUDGE else _decoded(body, config, filters, url, caption)
        if told := filters.failures():
            answer.setdefault("failures", []).extend(told)
        if place != IN_FRAME and tray.holds(data):
            tray.put(place, data)
            write_answer(answers, answer, data, place)
        else:
            write_answer(answers, answer, data)
        del job, body, data


def _judged(body: bytes, filters: Filters) -> tuple[dict[str, Any], bytes]:
    return {"reasons": [filters.pair(*pair) for pair in json.loads(body)]}, b""


def _decoded(
    body: bytes, config: DecodeConfig, filters: Filters, url: str, caption: str
) -> tuple[dict[str, Any], bytes]:
    try:
        decoded = decode(body, config, filters, url, caption)
        return _set_fields(decoded.outcome), decoded.data or b""
    except MemoryError:
        return _set_fields(Outcome(Status.UNDECODABLE, "memory")), b""
    except Exception:
        # A defect of ours, which costs this row and is told in the worker's log.
        failed = _set_fields(Outcome(Status.UNDECODABLE, "internal_error"))
        return failed | {"failures": [f"decoding a picture failed: {traceback.format_exc()}"]}, b""


def _set_fields(outcome: Outcome) -> dict[str, Any]:
    return {name: value for name, value in vars(outcome).items() if value is not None}


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(0)


def _limit_memory(beyond_rest: int) -> None:
    with open("/proc/self/statm") as file:
        at_rest = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (at_rest + beyond_rest, at_rest + beyond_rest))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
