"""Open a connection to an address that was checked: plainly, under TLS, or through a proxy.

The name is used for TLS alone (SNI and the certificate). A proxy gets the address too, not the name: it must not
resolve again what we have checked.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import cast

from yarl import URL

from ingest.address import IPAddress
from ingest.connection import MAX_HEAD_BYTES, Connection


async def dial(
    new: Callable[[], Connection],
    address: IPAddress,
    port: int,
    *,
    name: str,
    tls: ssl.SSLContext | None,
    proxy: URL | None,
) -> Connection:
    """Raises `OSError`, of which `ssl.SSLError` is one."""
    loop = asyncio.get_running_loop()
    # A name may end in a dot; a certificate's never does.
    server_name = name.rstrip(".") if tls is not None else None
    if proxy is None:
        _, connection = await loop.create_connection(new, str(address), port, ssl=tls, server_hostname=server_name)
    else:
        transport: asyncio.BaseTransport | None
        assert proxy.host is not None and proxy.port is not None, "the config lets no other URL through"
        transport, tunnel = await loop.create_connection(_Tunnel, proxy.host, proxy.port)
        target = f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
        try:
            await tunnel.opened(target)
            connection = new()
            if tls is None:
                transport.set_protocol(connection)
            else:
                transport = await loop.start_tls(transport, connection, tls, server_hostname=server_name)
                if transport is None:
                    raise ConnectionResetError("the proxy closed the tunnel")
        except BaseException:
            if transport is not None:
                transport.close()
            raise
        connection.connection_made(transport)
    connection.address = address
    return connection


class _Tunnel(asyncio.Protocol):
    """Until the proxy has said that the tunnel is open."""

    def __init__(self) -> None:
        self._head = b""
        self._answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    async def opened(self, target: str) -> None:
        self._transport.write(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        head = await self._answered
        if head.split(b" ", 2)[1:2] != [b"200"]:
            raise ConnectionRefusedError(f"the proxy answered {head[:40]!r}")

    def data_received(self, data: bytes) -> None:
        self._head += data
        whole = b"\r\n\r\n" in self._head or len(self._head) > MAX_HEAD_BYTES
        if whole and not self._answered.done():
            self._answered.set_result(self._head)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._answered.done():
            self._answered.set_exception(error or ConnectionResetError("the proxy closed the connection"))
