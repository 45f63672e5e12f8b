"""`python kill_each_write.py RUN LIST FIRST STEP`: take down in RUN-n and be killed before its n-th write, n by n.

A write is whatever changes a file of the run but its lease. Prints the first n that came through.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from cluster.storage import Folder
from pipeline.takedown import take_down

WRITES = ("write", "create", "settle", "upload", "delete")


def killed_before(operation: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    def call(folder: Folder, *arguments: Any, **named: Any) -> Any:
        if not folder.uri.endswith("/leases"):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
        return operation(folder, *arguments, **named)

    return call


def main(run: str, path: str, first: int, step: int) -> None:
    for number in range(first, 1000, step):
        victim = os.fork()
        if victim == 0:
            left = [number]
            for name in WRITES:
                setattr(Folder, name, killed_before(getattr(Folder, name), left))
            take_down(Folder(f"{run}-{number}"), "domains", path, purge=True)
            os._exit(0)
        status = os.waitpid(victim, 0)[1]
        if status == 0:
            print(number)
            return
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
