"""One driver a run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import WorkFailed
from cluster.lease import Lease, LeaseHeld, driver_of
from cluster.storage import Folder

HOLD = (
    "import sys, time; from cluster.lease import Lease; from cluster.storage import Folder\n"
    "with Lease(Folder(sys.argv[1])): print('held', flush=True); time.sleep(60)"
)


def holder_process(run: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def end(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_second_driver_is_told_who_holds_the_run(tmp_path: Path) -> None:
    process = holder_process(tmp_path)
    try:
        with pytest.raises(LeaseHeld, match=f"process {process.pid} on "), Lease(Folder(tmp_path)):
            pass
    finally:
        end(process)


def test_a_killed_drivers_lease_is_taken_over_at_once(tmp_path: Path) -> None:
    end(holder_process(tmp_path))
    assert driver_of(Folder(tmp_path)) is None
    with Lease(Folder(tmp_path)) as lease:
        assert lease.number == 2


def test_a_released_lease_is_free(tmp_path: Path) -> None:
    for number in (1, 2):
        with Lease(Folder(tmp_path)) as lease:
            assert lease.number == number
            assert (driver_of(Folder(tmp_path)) or {})["pid"] == os.getpid()
    assert driver_of(Folder(tmp_path)) is None


def test_a_driver_elsewhere_whose_heartbeat_is_old_has_lost_the_run_and_learns_it(tmp_path: Path) -> None:
    with Lease(Folder(tmp_path), heartbeat_s=60) as sleeper:
        body = json.loads((tmp_path / "leases" / "00000001.json").read_bytes())
        (tmp_path / "leases" / "00000001.json").write_text(json.dumps(body | {"host": "elsewhere", "heartbeat": 0}))
        sleeper.check()
        with Lease(Folder(tmp_path)):
            with pytest.raises(WorkFailed, match="taken over by another driver"):
                sleeper.check()
