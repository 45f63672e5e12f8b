"""Run training jobs one after another on a gang: `torchrun … gang.py JOBS.json`. What the tests start as processes.

A job is a payload of `train.worker.member` and, for the test's sake, `snapshot` {"at": step, "to": folder}: copy the
checkpoints there once that step is reported; or `kill_at`: SIGKILL of rank 0 at that step.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cluster.errors import UnclipError
from cluster.workshop import Workshop
from train.worker import member


def run(job: dict[str, Any]) -> dict[str, Any]:
    checkpoints = Path(Workshop.from_plain(job["out"]).work.uri) / "checkpoints"

    def report(message: dict[str, Any]) -> None:
        if message["step"] == job.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        snapshot = job.get("snapshot")
        if snapshot and message["step"] == snapshot["at"]:
            shutil.copytree(checkpoints, Path(snapshot["to"]) / "checkpoints")

    try:
        return member(job, report)
    except UnclipError as error:
        return {"error": str(error), "kind": type(error).__name__}


def main() -> None:
    results = [run(job) for job in json.loads(Path(sys.argv[1]).read_text())]
    if dist.get_rank() == 0:
        Path(sys.argv[1]).with_suffix(".results").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
