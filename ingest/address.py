"""Which URLs and which addresses may be fetched from: rules without any network.

Three rules, in this order, for every URL and again for every redirect:

    check_url       http or https, no credentials, and a host that is a name or an address spelled in the plain way
    check_address   of every address that the name resolves to (`ingest/resolver.py`); one bad address refuses the host
    connect         to an address that was checked, never to the name (no rebinding)

An address is good when it is public and its port one of `ports`, or when a network of `allow_networks` holds it (and
its port, where that network names one). IPv6 addresses that carry an IPv4 one (mapped, translated, NAT64) are judged by
the one that they carry; tunnels (6to4, Teredo) are refused.
"""

import ipaddress
import re
from collections.abc import Iterable
from functools import lru_cache

from yarl import URL

from ingest.fetch_config import parse_network

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?", re.IGNORECASE)
_NEVER_IN_A_URL = re.compile(r"[\x00-\x20\x7f]")
_TARGET = re.compile(r"[\x21-\x7e]+")
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


class AddressPolicy:
    """What may be fetched from is a function of URL, address and port."""

    def __init__(self, allow_networks: Iterable[str] = (), ports: Iterable[int] = (80, 443)) -> None:
        self._allowed = [parse_network(text) for text in allow_networks]
        self._ports = frozenset(ports)

    def check_url(self, url: str) -> URL:
        """The URL in the form in which it will be fetched. Raises `Refused`."""
        # yarl strips what browsers strip; a control character inside a URL is never an accident worth following.
        if _NEVER_IN_A_URL.search(url.strip()):
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
        refusal = _odd_host(host)
        if refusal is not None:
            raise Refused(refusal)
        if not _TARGET.fullmatch(parsed.raw_path_qs):
            raise Refused("url_malformed")
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
        if port not in self._ports:
            raise Refused("port")


@lru_cache(maxsize=16_384)
def _odd_host(host: str) -> str | None:
    """What is wrong with how a host is spelled, or None."""
    if literal_address(host) is not None:
        return None
    # 127.1, 0x7f000001, 2130706433, 0177.0.0.1: C libraries read these as addresses, each its own way.
    if _LAST_LABEL_IS_NUMBER.search(host.rstrip(".")) or ":" in host:
        return "address_spelling"
    return None if len(host) <= 253 and _NAME.fullmatch(host) else "url_malformed"


def literal_address(host: str) -> IPAddress | None:
    """The address that a host spells plainly (dotted quad, or IPv6 without a zone), or None."""
    if "%" in host:
        return None
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
