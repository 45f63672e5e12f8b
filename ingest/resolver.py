"""Names to addresses, by us: every answer is checked whole, and remembered for a while, a failure too.

Lookups run in threads, a bounded number at a time, because getaddrinfo blocks. How long a name waits for a thread is
our own doing: `Resolved.seconds` says what the lookup itself took, and only that counts against a URL's deadline.
"""

import asyncio
import ipaddress
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ingest.address import AddressPolicy, IPAddress, literal_address

LookUp = Callable[[str], Iterable[str]]

_REMEMBER_S = 60.0
_REMEMBER_NO_SUCH_NAME_S = 300.0
_REMEMBER_FAILURE_S = 2.0
_THREADS = 96
_REMEMBERED_NAMES = 50_000


class Unresolvable(Exception):
    """No address for this name. `may_pass`: the name server did not answer, rather than say that there is none."""

    def __init__(self, name: str, *, may_pass: bool, seconds: float) -> None:
        super().__init__(name)
        self.seconds = seconds
        self.may_pass = may_pass


@dataclass(frozen=True, slots=True)
class Resolved:
    """`addresses` in the order in which they are tried; empty where there is none."""

    addresses: tuple[IPAddress, ...]
    may_pass: bool
    seconds: float
    until: float


def system_look_up(name: str) -> list[str]:
    """What the machine's resolver says. Blocks; raises `socket.gaierror`."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]


class Resolver:
    """Resolves names on the running loop. `look_up` is called in a thread."""

    def __init__(self, policy: AddressPolicy, look_up: LookUp = system_look_up, *, timeout_s: float = 10.0) -> None:
        self._policy = policy
        self._look_up = look_up
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="resolver")
        self._free = asyncio.Semaphore(_THREADS)
        self._known: OrderedDict[str, Resolved] = OrderedDict()
        self._asking: dict[str, asyncio.Task[Resolved]] = {}

    async def resolve(self, name: str, port: int) -> Resolved:
        """Every address has been checked. Raises `Refused` or `Unresolvable`."""
        literal = literal_address(name)
        if literal is not None:
            found = Resolved((literal,), False, 0.0, float("inf"))
        else:
            known = self._known.get(name)
            found = known if known is not None and time.monotonic() < known.until else await self.asked(name)
        if not found.addresses:
            raise Unresolvable(name, may_pass=found.may_pass, seconds=found.seconds)
        for address in found.addresses:
            self._policy.check_address(address, port)
        return found

    def forget(self, name: str) -> bool:
        """Whether it was known."""
        return self._known.pop(name, None) is not None

    def forget_failures(self) -> None:
        """Of name servers that did not answer: it was us."""
        for name in [name for name, known in self._known.items() if known.may_pass]:
            del self._known[name]

    async def asked(self, name: str) -> Resolved:
        """A fresh answer, shared by all who ask for the name meanwhile."""
        task = self._asking.get(name)
        if task is None:
            task = self._asking[name] = asyncio.create_task(self._ask(name))
            task.add_done_callback(lambda _: self._asking.pop(name, None))
        # Shielded: one row's end must not cancel the answer that other rows of the host wait for.
        return await asyncio.shield(task)

    async def _ask(self, name: str) -> Resolved:
        await self._free.acquire()
        started = time.monotonic()
        job = asyncio.get_running_loop().run_in_executor(self._threads, self._look_up, name)
        # A thread cannot be cancelled: its place is free when it has ended, however long ago we stopped waiting.
        job.add_done_callback(self._thread_ended)
        addresses: tuple[IPAddress, ...] = ()
        may_pass, remember_s = True, _REMEMBER_FAILURE_S
        try:
            answer = await asyncio.wait_for(asyncio.shield(job), self._timeout_s)
            found = {ipaddress.ip_address(text.partition("%")[0]) for text in answer}
            addresses = tuple(sorted(found, key=lambda address: (address.version, int(address))))
            may_pass, remember_s = False, _REMEMBER_S if addresses else _REMEMBER_NO_SUCH_NAME_S
        except socket.gaierror as error:
            if error.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
                may_pass, remember_s = False, _REMEMBER_NO_SUCH_NAME_S
        except UnicodeError:
            may_pass, remember_s = False, _REMEMBER_NO_SUCH_NAME_S
        except (TimeoutError, OSError, ValueError):
            pass
        now = time.monotonic()
        resolved = Resolved(addresses, may_pass, now - started, now + remember_s)
        self._known[name] = resolved
        self._known.move_to_end(name)
        if len(self._known) > _REMEMBERED_NAMES:
            self._known.popitem(last=False)
        return resolved

    def _thread_ended(self, job: "asyncio.Future[Iterable[str]]") -> None:
        self._free.release()
        if not job.cancelled():
            job.exception()  # nobody may be waiting for it any more

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
