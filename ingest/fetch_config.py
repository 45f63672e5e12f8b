"""Settings of the guarded fetch: where it may go, how much it takes, how patient and how polite it is."""

import ipaddress
import re
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from cluster.settings import Section

_NETWORK = re.compile(
    r"^(?:\[(?P<v6>[0-9A-Fa-f:.]+)\](?P<v6_mask>/\d+)?|(?P<bare>[0-9A-Fa-f:.]+?/\d+|[0-9.]+))(?::(?P<port>\d+))?$"
)


def parse_network(text: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, int | None]:
    """`10.0.0.0/8`, `127.0.0.1/32:8642`, `fd00::/8`, `[::1]/128:8642` → the network, and its port if it names one."""
    match = _NETWORK.match(text.strip())
    try:
        if match is None:
            raise ValueError("not of the form network/bits or network/bits:port")
        address = match["bare"] or f"{match['v6']}{match['v6_mask'] or ''}"
        port = None if match["port"] is None else int(match["port"])
        if port is not None and not 1 <= port <= 65535:
            raise ValueError(f"port {port} is outside 1…65535")
        return ipaddress.ip_network(address), port
    except ValueError as error:
        raise ValueError(
            f"{text!r} is not a network ({error}); write 10.0.0.0/8, 127.0.0.1/32:8642, fd00::/8 or [::1]/128:8642"
        ) from None


def _checked_network(text: str) -> str:
    parse_network(text)
    return text


class FetchConfig(Section):
    """How pictures are fetched. The first six fields decide what an answer becomes; the rest is patience."""

    allow_networks: tuple[Annotated[str, AfterValidator(_checked_network)], ...] = Field(
        default=(), description="networks that may be fetched from although private: CIDR, with an optional :port"
    )
    ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = Field(default=(80, 443), description="of public hosts")
    max_bytes: int = Field(default=20_000_000, ge=1, description="of a body as it arrives")
    max_decompressed_bytes: int = Field(default=40_000_000, ge=1, description="of a body sent compressed")
    respect_robots_tag: bool = Field(default=True, description="X-Robots-Tag: noai, noimageai, noindex, noimageindex")
    respect_robots_txt: bool = Field(default=True, description="robots.txt, fetched once a host")

    user_agent: str = Field(
        default="unclip/0.1 (image dataset builder; +https://pypi.org/project/unclip-pipeline/)",
        pattern=r"^[\x20-\x7e]+$",
    )
    proxy: str | None = Field(
        default=None,
        pattern=r"^http://(\[[0-9A-Fa-f:.]+\]|[^/@:\[\]\s]+):\d{1,5}/?$",
        description="http://HOST:PORT of a proxy that allows CONNECT; it is told addresses, never names",
    )
    deadline_s: float = Field(default=10.0, gt=0, description="for a URL, all attempts and redirects together")
    min_rate_after_s: float = Field(default=5.0, gt=0)
    min_bytes_per_s: float = Field(default=1000.0, ge=0, description="required of a body after min_rate_after_s")
    attempts: int = Field(default=3, ge=1, le=10)
    backoff_s: float = Field(default=0.25, gt=0, description="before the second attempt; doubles for each further one")
    concurrency: int = Field(default=4096, ge=1, le=16384, description="requests in flight in one worker")
    connections_per_host: int = Field(default=16, ge=1, description="in the whole run; not inside allow_networks")
    requests_per_s_per_host: float = Field(default=50.0, gt=0, description="in the whole run; as above")
    limit_allowed_networks: bool = Field(default=False, description="hold both limits inside allow_networks too")
    host_failures: int = Field(default=8, ge=1, description="failures in a row after which a host is left alone")
    host_cooldown_s: float = Field(default=5.0, gt=0, description="how long it is left alone before one more try")
    host_patience_s: float = Field(
        default=30.0, ge=0, description="how long rows wait for a host that cools down or says Retry-After"
    )
    outage_patience_s: float = Field(
        default=1800.0, ge=0, description="how long to wait when no host at all answers, before the run stops"
    )
    buffered_bytes: int = Field(default=256_000_000, ge=1, description="of bodies in one worker, arriving or waiting")

    NOT_CONTENT: ClassVar[frozenset[str]] = frozenset(
        {
            "user_agent",
            "proxy",
            "deadline_s",
            "min_rate_after_s",
            "min_bytes_per_s",
            "attempts",
            "backoff_s",
            "concurrency",
            "connections_per_host",
            "requests_per_s_per_host",
            "limit_allowed_networks",
            "host_failures",
            "host_cooldown_s",
            "host_patience_s",
            "outage_patience_s",
            "buffered_bytes",
        }
    )
