"""Which URLs and which addresses may be fetched from.

Three rules, in this order, for every URL and again for every redirect:

    check_url       http or https, no credentials, and a host that is a name or an address spelled in the plain way
    resolve         by us; every address of the answer is checked, and one bad address refuses the host
    connect         to the addresses that were checked: `GuardedResolver` hands aiohttp nothing else (no rebinding)

An address is good when it is public and the port is 80 or 443, or when a network of `allow_networks` holds it (and its
port, where that network names one). IPv6 addresses that carry an IPv4 one (mapped, translated, NAT64) are judged by the
one that they carry; tunnels (6to4, Teredo) are refused.
"""

import asyncio
import ipaddress
import re
import socket
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from ingest.fetch_config import parse_network

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

PUBLIC_PORTS = frozenset({80, 443})
_REMEMBER_S = 60.0
_RESOLVER_THREADS = 16
_LAST_LABEL_IS_NUMBER = re.compile(r"(^|\.)(\d+|0x[0-9a-f]*)$", re.IGNORECASE)

# Prefixes under which the last 32 bits are the IPv4 address that is really meant.
_CARRIES_V4 = tuple(
    ipaddress.IPv6Network(text) for text in ("::ffff:0:0/96", "::ffff:0:0:0/96", "::/96", "64:ff9b::/96")
)
_TUNNELS = tuple(ipaddress.IPv6Network(text) for text in ("2002::/16", "2001::/32", "64:ff9b:1::/48"))
_RELAY_6TO4 = ipaddress.IPv4Network("192.88.99.0/24")
_SITE_LOCAL = ipaddress.IPv6Network("fec0::/10")


class Refused(Exception):
    """The policy says no. `reason` is the ledger's word for it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Unresolvable(Exception):
    """No address for this name."""


class AddressPolicy:
    """The rules, without any network: what may be fetched from is a function of URL, address and port."""

    def __init__(self, allow_networks: Iterable[str] = ()) -> None:
        self._allowed = [parse_network(text) for text in allow_networks]

    def check_url(self, url: str) -> URL:
        """The URL in the form in which it will be fetched. Raises `Refused`."""
        # yarl strips what browsers strip; a control character inside a URL is never an accident worth following.
        if any(ord(letter) <= 32 or ord(letter) == 127 for letter in url.strip()):
            raise Refused("url_malformed")
        try:
            parsed = URL(url.strip())
            host, port = parsed.raw_host, parsed.port
        except (ValueError, UnicodeError):
            raise Refused("url_malformed") from None
        if parsed.scheme not in ("http", "https"):
            raise Refused("scheme")
        if parsed.raw_user is not None or parsed.raw_password is not None:
            raise Refused("url_credentials")
        if not host or not port:
            raise Refused("url_malformed")
        if literal_address(host) is None and (_LAST_LABEL_IS_NUMBER.search(host.rstrip(".")) or ":" in host):
            # 127.1, 0x7f000001, 2130706433, 0177.0.0.1: C libraries read these as addresses, each its own way.
            raise Refused("address_spelling")
        return parsed.with_fragment(None)

    def allows(self, address: IPAddress, port: int) -> bool:
        """Whether `allow_networks` holds the address."""
        address = carried_address(address)
        return any(
            address.version == network.version and address in network and named in (None, port)
            for network, named in self._allowed
        )

    def check_address(self, address: IPAddress, port: int) -> None:
        """Raises `Refused` with the address's kind, or with `port`."""
        if self.allows(address, port):
            return
        kind = address_kind(address)
        if kind is not None:
            raise Refused(kind)
        if port not in PUBLIC_PORTS:
            raise Refused("port")


def literal_address(host: str) -> IPAddress | None:
    """The address that a host spells plainly (dotted quad, or IPv6 without a zone), or None."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def carried_address(address: IPAddress) -> IPAddress:
    """The IPv4 address inside a mapped, compatible, translated or NAT64 one; else the address itself."""
    if isinstance(address, ipaddress.IPv6Address):
        plain = ipaddress.IPv6Address(int(address))
        # :: and ::1 lie in the "compatible" prefix and mean themselves.
        if int(plain) > 1 and any(plain in network for network in _CARRIES_V4):
            return ipaddress.IPv4Address(int(plain) & 0xFFFFFFFF)
        return plain
    return address


def address_kind(address: IPAddress) -> str | None:
    """Why an address is not public, or None where it is."""
    address = carried_address(address)
    tests = (
        ("address_unspecified", address.is_unspecified),
        ("address_loopback", address.is_loopback),
        ("address_link_local", address.is_link_local),
        ("address_multicast", address.is_multicast),
        ("address_tunnel", any(address in network for network in _TUNNELS if network.version == address.version)),
        ("address_private", address.is_private),
        ("address_reserved", address.is_reserved or not address.is_global),
        ("address_reserved", address in _RELAY_6TO4 if address.version == 4 else address in _SITE_LOCAL),
    )
    return next((kind for kind, holds in tests if holds), None)


class GuardedResolver(AbstractResolver):
    """Resolves, checks, remembers for a minute. aiohttp connects to what `resolve` returns and to nothing else.

    aiohttp does not ask a resolver about literal addresses: `check` must be awaited before every request.
    """

    def __init__(self, policy: AddressPolicy) -> None:
        self._policy = policy
        self._threads = ThreadPoolExecutor(_RESOLVER_THREADS, thread_name_prefix="resolver")
        self._known: dict[str, tuple[float, asyncio.Task[list[IPAddress]]]] = {}

    async def check(self, host: str, port: int) -> bool:
        """Whether the host lies inside `allow_networks` as a whole. Raises `Refused` or `Unresolvable`."""
        addresses = await self._addresses(host)
        for address in addresses:
            self._policy.check_address(address, port)
        return all(self._policy.allows(address, port) for address in addresses)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        await self.check(host, port)
        return [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=socket.AF_INET if address.version == 4 else socket.AF_INET6,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address in await self._addresses(host)
        ]

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _addresses(self, host: str) -> list[IPAddress]:
        literal = literal_address(host)
        if literal is not None:
            return [literal]
        now = time.monotonic()
        known = self._known.get(host)
        if known is None or now > known[0]:
            known = (now + _REMEMBER_S, asyncio.create_task(self._look_up(host)))
            self._known[host] = known
        # Shielded: one row's deadline must not cancel the answer that other rows of the host wait for.
        return await asyncio.shield(known[1])

    async def _look_up(self, host: str) -> list[IPAddress]:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(
                self._threads, lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            )
        except (OSError, UnicodeError):
            raise Unresolvable(host) from None
        addresses = {ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found}
        if not addresses:
            raise Unresolvable(host)
        return sorted(addresses, key=lambda address: (address.version, int(address)))
