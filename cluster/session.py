"""The Ray session of a run: started at the first piece of work, so a run with nothing to do starts none.

Two doors lead to Ray, and both take import paths, so that no other folder imports it:

    map_shards("ingest.images:ImagesWorker", kwargs, tasks)    a pool of actors over many independent shards
    run_gang("train.worker:member", payload)                   W processes that talk to each other (torch.distributed)
    call("embed.pca:member", payload)                          one process of the gang, for work that is not sharded

Pools and gangs outlive a stage: the next stage that asks for the same finds its processes warm (imports of torch and
deepspeed cost seconds). Asking for another kind ends the one before, since both may want every CPU.
"""

import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any, Self

from cluster.canonical import digest
from cluster.config import ClusterConfig
from cluster.errors import UnclipError, UserError, WorkFailed
from cluster.pool import POLL_S, START_TIMEOUT_S, Plain, ShardPool, failure_reason, load


class Session:
    """One Ray session, one pool or one gang at a time. Use as a context manager."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._ray: Any = None
        self._pool: tuple[str, ShardPool] | None = None
        self._gang: tuple[list[Any], Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ray is not None:
            self._release()
            self._ray.shutdown()
            self._ray = None

    @property
    def started(self) -> bool:
        return self._ray is not None

    def map_shards(
        self,
        worker: str,
        kwargs: Plain,
        tasks: Sequence[Plain],
        *,
        shared: tuple[str, Plain] | None = None,
        in_flight: int = 1,
        on_result: Callable[[Plain, Plain], None] = lambda task, result: None,
        on_shared: Callable[[Plain], None] = lambda report: None,
    ) -> None:
        """`worker(**kwargs).process(task)` for every task, on a pool of actors, each after one `setup()`.

        A task whose actor dies or raises is tried again, elsewhere; one that fails `shard_attempts` times is poisoned:
        the others are finished first, then `WorkFailed` names it and why. An `UnclipError` is not tried again.

        `in_flight`  tasks at once in one actor: `process` is then called from that many threads
        `shared`     a class and its kwargs: one instance for all workers, in a process of its own. Their `setup` gets
                     `ask=`: ask(method, *args) → concurrent.futures.Future. `on_shared` gets its `report()` about once
                     a second. When its process dies a new instance takes over, with nothing of the old one's state.
        """
        if not tasks:
            return
        pool = self._shard_pool(worker, kwargs, shared, in_flight)
        try:
            size = min(self._config.shard_actors, len(tasks))
            pool.run(tasks, size=size, on_result=on_result, on_shared=on_shared)
        except BaseException:  # what is still in flight would keep its actor from the next stage
            self._release()
            raise

    def run_gang(
        self, function: str, payload: Plain, *, on_report: Callable[[Plain], None] = lambda report: None
    ) -> list[Plain]:
        """`function(payload, report)` on every process of the gang at once; the results by rank.

        A member that fails ends the gang: its fellows would wait for it in a collective for ever.
        """
        self._start()
        return self._run_on(self._members(), function, payload, on_report)

    def call(self, function: str, payload: Plain, *, on_report: Callable[[Plain], None] = lambda report: None) -> Plain:
        """`function(payload, report)` on one process of the gang. It must not use torch.distributed."""
        self._start()
        return self._run_on(self._members()[:1], function, payload, on_report)[0]

    def _run_on(
        self, members: list[Any], function: str, payload: Plain, on_report: Callable[[Plain], None]
    ) -> list[Plain]:
        ray = self._ray
        references = [member.run.remote(function, payload) for member in members]
        waiting = list(references)
        try:
            while waiting:
                done, waiting = ray.wait(waiting, num_returns=1, timeout=POLL_S)
                ray.get(done)
                for report in ray.get(members[0].reports.remote()):
                    on_report(report)
            return list(ray.get(references))
        except ray.exceptions.RayError as error:
            self._release()
            cause = getattr(error, "cause", None)
            if isinstance(cause, UnclipError):
                raise cause from None
            raise WorkFailed(f"{function} failed: {failure_reason(ray, error)[0]}") from error
        except BaseException:
            self._release()
            raise

    def _start(self) -> Any:
        if self._ray is not None:
            return self._ray
        # Read when ray is imported: nothing is sent anywhere, and an actor without a GPU keeps CUDA_VISIBLE_DEVICES.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        own = self._config.address is None
        try:
            ray.init(
                address=self._config.address or "local",
                num_cpus=(self._config.cpus or max(os.cpu_count() or 1, self._least_cpus)) if own else None,
                object_store_memory=self._config.object_store_bytes if own else None,
                include_dashboard=False if own else None,
                log_to_driver=False,
                logging_level="ERROR",
            )
        except ConnectionError as error:
            raise UserError(f"no Ray cluster answers at cluster.address={self._config.address!r}: {error}") from error
        self._ray = ray
        return ray

    @property
    def _least_cpus(self) -> int:
        return max(self._config.shard_actors, self._config.gang_size)

    def _shard_pool(self, worker: str, kwargs: Plain, shared: tuple[str, Plain] | None, in_flight: int) -> ShardPool:
        ray = self._start()
        key = digest([worker, kwargs, shared, in_flight])
        if self._pool is None or self._pool[0] != key:
            self._release()
            attempts = self._config.shard_attempts
            pool = ShardPool(ray, worker, kwargs, shared=shared, in_flight=in_flight, attempts=attempts)
            self._pool = (key, pool)
        return self._pool[1]

    def _members(self) -> list[Any]:
        ray, size = self._ray, self._config.gang_size
        if self._gang is None:
            self._release()
            from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

            group = ray.util.placement_group([{"CPU": 1}] * size, strategy="PACK")
            if not group.wait(START_TIMEOUT_S):
                ray.util.remove_placement_group(group)
                raise WorkFailed(
                    f"a gang of {size} processes needs {size} free CPUs; the cluster has "
                    f"{ray.cluster_resources().get('CPU', 0):g}. Lower cluster.gang_size."
                )
            members = [
                ray.remote(_Member)
                .options(
                    num_cpus=1,
                    max_concurrency=2,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
                )
                .remote()
                for rank in range(size)
            ]
            self._gang = (members, group)
            host, port = ray.get(members[0].rendezvous.remote())
            nodes = ray.get([member.node.remote() for member in members])
            local_ranks = [nodes[:rank].count(node) for rank, node in enumerate(nodes)]
            ray.get(
                [member.join.remote(rank, size, local_ranks[rank], host, port) for rank, member in enumerate(members)]
            )
        return self._gang[0]

    def _release(self) -> None:
        """End the pool and the gang; their CPUs are free soon after."""
        if self._pool:
            self._pool[1].release()
        if self._gang:
            for member in self._gang[0]:
                self._ray.kill(member, no_restart=True)
            self._ray.util.remove_placement_group(self._gang[1])
        self._pool = self._gang = None


class _Member:
    def __init__(self) -> None:
        self._reports: list[Plain] = []
        self._lock = threading.Lock()

    def rendezvous(self) -> tuple[str, int]:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        import ray

        return ray.util.get_node_ip_address(), port

    def node(self) -> str:
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def join(self, rank: int, size: int, local_rank: int, host: str, port: int) -> None:
        """Say who we are in the words that torchrun uses, before anything imports torch."""
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(local_rank),
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        if not os.path.exists("/dev/nvidia0"):
            os.environ["DS_ACCELERATOR"] = "cpu"

    def run(self, function: str, payload: Plain) -> Plain:
        result: Plain = load(function)(payload, self._report)
        return result

    def _report(self, report: Plain) -> None:
        with self._lock:
            self._reports.append(report)

    def reports(self) -> list[Plain]:
        with self._lock:
            taken, self._reports = self._reports, []
        return taken
