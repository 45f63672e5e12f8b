"""A Ray session as ours, with as many actors, that do nothing: what a run's memory is counted above.

Run as `python -m benchmarks.ingest.bare SECONDS`.
"""

import sys
import time
from typing import Any

from benchmarks.ingest.ours import ACTORS
from cluster.config import ClusterConfig
from cluster.session import Session


class Idle:
    """A worker whose shard is a nap."""

    def setup(self, **_: Any) -> None: ...

    def process(self, task: dict[str, Any]) -> dict[str, Any]:
        time.sleep(float(task["seconds"]))
        return {}


if __name__ == "__main__":
    with Session(ClusterConfig(shard_actors=ACTORS)) as session:
        tasks = [{"shard": shard, "seconds": sys.argv[1]} for shard in range(ACTORS)]
        session.map_shards("benchmarks.ingest.bare:Idle", {}, tasks)
