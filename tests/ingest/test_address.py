import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.address import AddressPolicy, Refused, address_kind
from ingest.fetch_config import parse_network

REFUSED_NETWORKS = [
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/29",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/4", "240.0.0.0/4", "::/128", "::1/128", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
    "2001:db8::/32", "2002::/16", "2001::/32", "64:ff9b:1::/48", "100::/64",
]  # fmt: skip


@st.composite
def refused_addresses(draw: st.DrawFn, version: int | None = None) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    networks = [ipaddress.ip_network(text) for text in REFUSED_NETWORKS]
    network = draw(st.sampled_from([n for n in networks if version in (None, n.version)]))
    return network[draw(st.integers(0, network.num_addresses - 1))]


def is_refused(policy: AddressPolicy, url: str) -> bool:
    """By the policy alone, or because of what every resolver on this machine would make of the host."""
    try:
        parsed = policy.check_url(url)
    except Refused:
        return True
    assert parsed.raw_host is not None and parsed.port is not None
    try:
        policy.check_address(ipaddress.ip_address(parsed.raw_host), parsed.port)
    except (Refused, ValueError):
        return True
    return False


@given(refused_addresses())
def test_refused_addresses_are_refused(address: ipaddress.IPv4Address | ipaddress.IPv6Address):
    assert address_kind(address) is not None


@given(
    refused_addresses(4),
    st.sampled_from(["::ffff:0:0/96", "::ffff:0:0:0/96", "::/96", "64:ff9b::/96"]),
)
def test_ipv4_inside_ipv6_is_judged_by_what_it_carries(address: ipaddress.IPv4Address, prefix: str):
    carrier = ipaddress.IPv6Address(int(ipaddress.IPv6Network(prefix).network_address) | int(address))
    assert address_kind(carrier) is not None


def spellings(address: ipaddress.IPv4Address) -> list[str]:
    number, (a, b, c, d) = int(address), address.packed
    return [
        f"{a}.{b}.{c}.{d}", f"{a}.{b}.{c}.{d}.", f"{number}", f"{number:#x}", f"{number:#o}", f"0{number:o}",
        f"{a}.{(b << 16) + (c << 8) + d}", f"{a}.{b}.{(c << 8) + d}", f"0{a:o}.0{b:o}.0{c:o}.0{d:o}",
        f"{a:#x}.{b:#x}.{c:#x}.{d:#x}", f"{a:#X}.{b}.{c}.{d}", f"[::ffff:{a}.{b}.{c}.{d}]", f"[::{a}.{b}.{c}.{d}]",
        f"[64:ff9b::{a}.{b}.{c}.{d}]", f"[2002:{a:02x}{b:02x}:{c:02x}{d:02x}::1]",
        "".join(chr(ord(x) + 0xFEE0) if x.isdigit() else x for x in f"{a}.{b}.{c}.{d}"),
        f"{a:#x}.{(b << 16) + (c << 8) + d:#o}", f"{a:03d}.{b:03d}.{c:03d}.{d:03d}", f"0{a}.{b}.{c}.{d}",
        f"{number:#018x}", f"{number + 2**32}", f"[::FFFF:{number >> 16:X}:{number & 0xFFFF:x}]",
        f"[0:0:0:0:0:ffff:{number >> 16:x}:{number & 0xFFFF:04X}]", f"[::ffff:{a}.{b}.{c}.{d}%eth0]",
        f"[2001:0:4136:e378:8000:63bf:{number >> 16 ^ 0xFFFF:x}:{number & 0xFFFF ^ 0xFFFF:x}]",
        f"{a}.{b}.{c}.{d}..", f"{a}.{b}.{c}.{d}%00.example.com", f"{a}%2E{b}%2e{c}.{d}", f"{a}\uff0e{b}\uff61{c}.{d}",
        "".join(chr(0x2460 + int(x) - 1) if x in "123456789" else x for x in f"{a}.{b}.{c}.{d}"),
        "".join(chr(0x660 + int(x)) if x.isdigit() else x for x in f"{a}.{b}.{c}.{d}"),
        "".join(chr(0x1D7CE + int(x)) if x.isdigit() else x for x in f"{a}.{b}.{c}.{d}"), f"{a}\u00ad.{b}.{c}.{d}",
        f"{a}\u3002{b}\u3002{c}\u3002{d}", f"%{ord(str(a)[0]):x}{str(a)[1:]}.{b}.{c}.{d}",
    ]  # fmt: skip


@given(
    refused_addresses(4),
    st.data(),
    st.sampled_from(["http", "https", "HTTP"]),
    st.sampled_from(["", ":80", ":443", ":8080"]),
)
def test_every_spelling_of_a_refused_address_is_refused(
    address: ipaddress.IPv4Address, data: st.DataObject, scheme: str, port: str
):
    host = data.draw(st.sampled_from(spellings(address)))
    assert is_refused(AddressPolicy(), f"{scheme}://{host}{port}/picture.jpg")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file:///etc/passwd", "scheme"),
        ("ftp://example.com/x", "scheme"),
        ("data:image/png;base64,AAAA", "scheme"),
        ("//example.com/x.jpg", "scheme"),
        ("picture.jpg", "scheme"),
        ("", "scheme"),
        ("http://user@example.com/", "url_credentials"),
        ("http://user:word@example.com/", "url_credentials"),
        ("http://", "url_malformed"),
        ("http://example.com:99999/", "url_malformed"),
        ("http://exa mple.com/", "url_malformed"),
        ("http://example.com/\r\nHost: evil", "url_malformed"),
        ("http://[::1", "url_malformed"),
        ("http://127.1/", "address_spelling"),
        ("http://0x7f000001/", "address_spelling"),
        ("http://2130706433/", "address_spelling"),
    ],
)
def test_urls_that_no_request_is_made_for(url: str, reason: str):
    with pytest.raises(Refused) as refusal:
        AddressPolicy().check_url(url)
    assert refusal.value.reason == reason


@given(st.ip_addresses(v=4), st.integers(1, 65535))
def test_public_addresses_pass_on_the_two_public_ports_only(address: ipaddress.IPv4Address, port: int):
    if not address.is_global or address.is_multicast or address in ipaddress.ip_network("192.88.99.0/24"):
        return
    policy = AddressPolicy()
    if port in (80, 443):
        policy.check_address(address, port)
    else:
        with pytest.raises(Refused, match="port"):
            policy.check_address(address, port)


def test_allowed_networks_open_their_addresses_and_ports_and_no_others():
    policy = AddressPolicy(["127.0.0.1/32", "10.1.0.0/16:8000", "[::1]/128:9000", "fd00::/8"])
    for address, port in (("127.0.0.1", 1), ("10.1.2.3", 8000), ("::1", 9000), ("fd12::1", 5), ("::ffff:127.0.0.1", 7)):
        policy.check_address(ipaddress.ip_address(address), port)
    for address, port in (("127.0.0.2", 80), ("10.1.2.3", 8001), ("10.2.0.1", 8000), ("::1", 80), ("fe80::1", 80)):
        with pytest.raises(Refused):
            policy.check_address(ipaddress.ip_address(address), port)


@pytest.mark.parametrize(
    ("text", "network", "port"),
    [
        ("10.0.0.0/8", "10.0.0.0/8", None),
        ("127.0.0.1", "127.0.0.1/32", None),
        ("127.0.0.1:80", "127.0.0.1/32", 80),
        ("127.0.0.0/8:8642", "127.0.0.0/8", 8642),
        ("::1/128", "::1/128", None),
        ("[::1]/128:8642", "::1/128", 8642),
        ("[fd00::]/8", "fd00::/8", None),
        ("[::1]:80", "::1/128", 80),
    ],
)
def test_networks_are_written_as_cidr_with_an_optional_port(text: str, network: str, port: int | None):
    assert parse_network(text) == (ipaddress.ip_network(network), port)


@pytest.mark.parametrize("text", ["", "localhost", "10.0.0.1/8", "10.0.0.0/33", "127.0.0.1/32:0", "127.0.0.1/32:x"])
def test_what_is_no_network_is_named(text: str):
    with pytest.raises(ValueError, match="is not a network"):
        parse_network(text)
