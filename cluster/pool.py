"""A pool of actors over independent shards, on any number of nodes. Any process of it may die at any time.

    waiting ──► actors with a free slot (`in_flight` tasks at once in one actor, each on a thread of its own) ──► done
       ▲                                   │ the actor's process dies
       └── a task that raised ◄──┐         ▼
                                 └── quarantine: each of its tasks again, alone in an actor

A process that held several tasks does not say which of them killed it. So none is charged; each goes on alone, and the
one that kills its process again is the guilty one: after `attempts` failures of its own it is poisoned, its neighbours
never.

An optional *shared* instance serves all workers of the pool from a process of its own (0 CPUs). Ray starts it again,
anywhere, when its process dies, and repeats the calls that were on their way: `ask` never fails for that.
"""

import collections
import contextlib
import importlib
import re
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from cluster.errors import UnclipError, WorkFailed

Plain = dict[str, Any]
Ask = Callable[..., Future[Any]]
POLL_S = 0.25
REPORT_EVERY_S = 1.0
START_TIMEOUT_S = 120.0
HOPELESS = 8  # shards poisoned with none done between them: an outage, a full disk; the others would end the same way


class _Slot:
    """What the driver knows of one actor."""

    def __init__(self, handle: Any, *, replaces: bool) -> None:
        self.handle = handle
        self.replaces = replaces
        self.asked_at = time.monotonic()
        self.placed = False
        self.ready = False
        self.starting: Any = handle.node.remote()
        self.tasks: dict[Any, Plain] = {}
        self.alone = False


class ShardPool:
    """Actors that live from one `run` to the next. Where `run` raises, release them."""

    def __init__(
        self, ray: Any, worker: str, kwargs: Plain, *, shared: tuple[str, Plain] | None, in_flight: int, attempts: int
    ) -> None:
        self._ray = ray
        self._worker, self._kwargs = worker, kwargs
        self._in_flight, self._attempts = in_flight, attempts
        self._shared_of = shared
        self._shared: Any = None
        self._slots: list[_Slot] = []

    def release(self) -> None:
        for slot in self._slots:
            self._ray.kill(slot.handle, no_restart=True)
        if self._shared is not None:
            self._ray.kill(self._shared, no_restart=True)
        self._slots, self._shared = [], None

    def run(
        self,
        tasks: Sequence[Plain],
        *,
        size: int,
        on_result: Callable[[Plain, Plain], None],
        on_shared: Callable[[Plain], None],
    ) -> None:
        """Every task on one of at most `size` actors. Raises `WorkFailed` that names the poisoned shards."""
        self._slots += [self._new_slot() for _ in range(size - len(self._slots))]
        # Ray keeps a process ready for each CPU: the actors take those, and all start at the same moment.
        if self._shared_of is not None and self._shared is None:
            self._shared = self._start_shared(*self._shared_of)
        for slot in self._slots:
            slot.asked_at = time.monotonic()
        self._waiting = collections.deque(tasks)
        self._quarantine: collections.deque[Plain] = collections.deque()
        self._failures: collections.Counter[int] = collections.Counter()
        self._poisoned: dict[int, str] = {}
        self._in_a_row = self._failed_starts = 0
        self._hopeless = False
        self._on_result = on_result
        report: Any = None
        reported_at = time.monotonic()
        while self._waiting or self._quarantine or any(slot.tasks for slot in self._slots):
            self._check_placement()
            self._hand_out()
            done = self._wait()
            for slot in list(self._slots):
                self._collect(slot, done)
            if self._in_a_row >= max(HOPELESS, 2 * size * self._in_flight):
                self._hopeless = True
                self._waiting.clear()
                self._quarantine.clear()
            if self._shared is not None and report is None and time.monotonic() - reported_at >= REPORT_EVERY_S:
                report = self._shared.call.remote("report")
                reported_at = time.monotonic()
            report = self._told(report, on_shared)
        for slot in [slot for slot in self._slots if not slot.placed]:
            self._drop(slot)
        self._say_poisoned(len(tasks))

    def _say_poisoned(self, asked: int) -> None:
        if not self._poisoned:
            return
        rest = " one after another; the rest was not tried" if self._hopeless else "; the others are done"
        lines = "\n".join(f"  shard {shard}: {reason}" for shard, reason in sorted(self._poisoned.items())[:8])
        raise WorkFailed(f"{len(self._poisoned)} of {asked} shards failed{rest}.\n{lines}")

    def _wait(self) -> set[Any]:
        pending = [reference for slot in self._slots for reference in (*slot.tasks, slot.starting) if reference]
        done, _ = self._ray.wait(pending, num_returns=1, timeout=POLL_S)
        if done:  # whatever else has ended too
            done, _ = self._ray.wait(pending, num_returns=len(pending), timeout=0)
        return set(done)

    def _hand_out(self) -> None:
        """A task in quarantine goes to an actor that has nothing else; the others to whoever has least to do.

        Nobody takes more than its share of what is left: the first that is ready would else take all of a short run.
        """
        for slot in sorted((slot for slot in self._slots if slot.ready), key=lambda slot: len(slot.tasks)):
            if self._quarantine and not slot.tasks:
                self._give(slot, self._quarantine.popleft())
                slot.alone = True
        left = len(self._waiting) + sum(len(slot.tasks) for slot in self._slots)
        most = min(self._in_flight, -(-left // max(1, len(self._slots))))
        for _ in range(most):
            for slot in self._slots:
                if self._waiting and slot.ready and not slot.alone and len(slot.tasks) < most:
                    self._give(slot, self._waiting.popleft())

    def _give(self, slot: _Slot, task: Plain) -> None:
        slot.tasks[slot.handle.process.remote(task)] = task

    def _collect(self, slot: _Slot, done: set[Any]) -> None:
        died: str | None = None
        for reference in [reference for reference in slot.tasks if reference in done]:
            try:
                result = self._ray.get(reference)
            except (self._ray.exceptions.RayActorError, self._ray.exceptions.NodeDiedError) as error:
                died = failure_reason(self._ray, error)[0]
            except self._ray.exceptions.RayError as error:
                self._charge(slot.tasks.pop(reference), *failure_reason(self._ray, error))
            else:
                self._in_a_row = 0
                self._on_result(slot.tasks.pop(reference), result)
        slot.alone = slot.alone and bool(slot.tasks)
        if died is not None:
            self._bury(slot, died)
        elif slot.starting in done:
            self._started(slot)

    def _started(self, slot: _Slot) -> None:
        """An actor starts in two steps: a process somewhere, then the worker's `setup`, which may take its time."""
        try:
            self._ray.get(slot.starting)
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, UnclipError):
                raise cause from None
            self._failed_starts += 1
            if self._failed_starts >= self._attempts:
                raise WorkFailed(f"{self._worker} does not start: {failure_reason(self._ray, error)[0]}") from error
            self._replace(slot)
            return
        if slot.placed:
            slot.starting, slot.ready, self._failed_starts = None, True, 0
        else:
            slot.placed = True
            slot.starting = slot.handle.start.remote(self._worker, self._kwargs, self._shared)

    def _bury(self, slot: _Slot, reason: str) -> None:
        lost = list(slot.tasks.values())
        if len(lost) == 1:
            self._charge(lost[0], reason, final=False, alone=True)
        else:
            self._quarantine.extend(lost)
        self._replace(slot)

    def _charge(self, task: Plain, reason: str, final: bool, *, alone: bool = False) -> None:
        self._failures[id(task)] += 1
        if final or self._failures[id(task)] >= self._attempts:
            self._poisoned[task["shard"]] = reason
            self._in_a_row += 1
        else:
            (self._quarantine if alone else self._waiting).append(task)

    def _replace(self, slot: _Slot) -> None:
        self._drop(slot)
        self._slots.append(self._new_slot(replaces=True))

    def _drop(self, slot: _Slot) -> None:
        self._slots.remove(slot)
        self._ray.kill(slot.handle, no_restart=True)  # it may be cut off and not dead

    def _new_slot(self, *, replaces: bool = False) -> _Slot:
        actor = self._ray.remote(_ShardActor).options(
            num_cpus=1, max_restarts=0, max_concurrency=self._in_flight, scheduling_strategy="SPREAD"
        )
        return _Slot(actor.remote(), replaces=replaces)

    def _check_placement(self) -> None:
        """An actor that was asked for must find a place; the successor of a dead one only where no other is left."""
        unplaced = [slot for slot in self._slots if not slot.placed]
        late = [slot for slot in unplaced if time.monotonic() - slot.asked_at > START_TIMEOUT_S]
        if any(not slot.replaces for slot in late) or (late and len(unplaced) == len(self._slots)):
            nodes = [node for node in self._ray.nodes() if node["Alive"]]
            raise WorkFailed(
                f"{len(late)} of {len(self._slots)} processes for {self._worker} found no place in {START_TIMEOUT_S:g} "
                f"s: each needs 1 free CPU; the cluster has {self._ray.cluster_resources().get('CPU', 0):g} on "
                f"{len(nodes)} nodes, {self._ray.available_resources().get('CPU', 0):g} of them free. "
                f"Lower cluster.shard_actors, or give the cluster more nodes."
            )

    def _start_shared(self, path: str, kwargs: Plain) -> Any:
        handle = (
            self._ray.remote(_SharedActor)
            .options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
            .remote(path, kwargs)
        )
        try:
            self._ray.get(handle.call.remote("report"), timeout=START_TIMEOUT_S)
        except self._ray.exceptions.RayError as error:
            self._ray.kill(handle, no_restart=True)
            raise WorkFailed(f"{path} does not start within {START_TIMEOUT_S:g} s: {error}") from error
        return handle

    def _told(self, report: Any, on_shared: Callable[[Plain], None]) -> Any:
        """The reference that is still on its way, or None; a report that was lost is nobody's loss."""
        if report is None or not self._ray.wait([report], timeout=0)[0]:
            return report
        with contextlib.suppress(self._ray.exceptions.RayActorError):
            on_shared(self._ray.get(report))
        return None


class _ShardActor:
    def node(self) -> str:
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def start(self, worker: str, kwargs: Plain, shared: Any) -> None:
        self._worker = load(worker)(**kwargs)
        if shared is None:
            self._worker.setup()
        else:
            self._worker.setup(ask=_ask(shared))

    def process(self, task: Plain) -> Plain:
        started = time.monotonic()
        result: Plain = self._worker.process(task)
        return {"seconds": time.monotonic() - started} | result


class _SharedActor:
    def __init__(self, path: str, kwargs: Plain) -> None:
        self._instance = load(path)(**kwargs)

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self._instance, method)(*args)


def _ask(shared: Any) -> Ask:
    def ask(method: str, *args: Any) -> Future[Any]:
        future: Future[Any] = shared.call.remote(method, *args).future()
        return future

    return ask


def load(path: str) -> Any:
    """What `package.module:name` names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def failure_reason(ray: Any, error: Exception) -> tuple[str, bool]:
    """Why a task failed, for a person, and whether trying again is pointless."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, UnclipError):
        return str(cause), True
    if isinstance(error, ray.exceptions.RayTaskError):
        return "".join(traceback.format_exception_only(cause or error)).strip() + f"\n{error}", False
    detail = re.search(r"exit detail: (.*)", str(error)) or re.search(r"(.*out of memory.*|.*OOM.*)", str(error))
    return f"its process died ({type(error).__name__}{f': {detail[1][:300]}' if detail else ''})", False
