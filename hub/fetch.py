"""Download a file from an address that a stranger may have written: bounded in time and size, public hosts alone.

A name is resolved once per request and the connection goes to the address that was checked, so that a name server
that answers differently the second time gains nothing. Redirects are followed here, each with the same check. Proxies
of the environment are not used, since they would resolve the name again.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from urllib.parse import urljoin, urlsplit

MAX_BYTES = 50_000_000
SECONDS = 20  # for everything: names, redirects, headers and the last byte
REDIRECTS = 3
# Networks whose addresses stand for others: NAT64, 6to4 and Teredo.
TUNNELS = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")))


def fetch(url: str, public_only: bool = False, seconds: float | None = None, max_bytes: int | None = None) -> bytes:
    """
    The bytes behind an http(s) address.

    Args:
        public_only: refuse names that resolve to an address that is not public: loopback, private and link-local
            networks, metadata services of clouds.
        seconds, max_bytes: limits on the whole, by default `SECONDS` and `MAX_BYTES`.

    Raises:
        ValueError: it cannot be fetched within the limits, or an address is refused; says why in one line.
    """
    deadline = time.monotonic() + (SECONDS if seconds is None else seconds)
    address, limit = url, MAX_BYTES if max_bytes is None else max_bytes
    for _ in range(REDIRECTS + 1):
        try:
            status, location, data = _request(address, public_only, deadline, limit)
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            late = time.monotonic() >= deadline
            raise ValueError(f"{url} cannot be fetched: {'it took too long' if late else error}") from error
        if location is None:
            if status != 200:
                raise ValueError(f"{url} cannot be fetched: status {status}")
            if len(data) > limit:
                raise ValueError(f"{url} is larger than {limit} bytes; download and shrink it first")
            return data
        address = urljoin(address, location)
    raise ValueError(f"{url} cannot be fetched: more than {REDIRECTS} redirects")


def _request(url: str, public_only: bool, deadline: float, limit: int) -> tuple[int, str | None, bytes]:
    """Status, where it redirects to, and the bytes, of which at most one more than the limit is read."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url} is not an http(s) address")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    target = _resolve(parts.hostname, port, public_only)
    connection = http.client.HTTPConnection(parts.hostname, port)
    connection.sock = socket.create_connection(target, timeout=max(deadline - time.monotonic(), 0.001))
    # Limits of the socket hold for each read; a server that sends a byte now and then is cut off here.
    cut = threading.Timer(max(deadline - time.monotonic(), 0), _shut, [connection.sock])
    cut.start()
    try:
        if parts.scheme == "https":
            context = ssl.create_default_context()
            connection.sock = context.wrap_socket(connection.sock, server_hostname=parts.hostname)
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        host = host if parts.port is None else f"{host}:{port}"
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"Host": host, "User-Agent": "granulon"})
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308) and response.headers.get("Location"):
            return response.status, response.headers["Location"], b""
        data = response.read(limit + 1) if response.status == 200 else b""
        if time.monotonic() >= deadline:
            raise TimeoutError("it took too long")
        if response.status == 200 and len(data) <= limit and response.length:
            raise http.client.IncompleteRead(data, response.length)
        return response.status, None, data
    finally:
        cut.cancel()
        connection.close()


def _resolve(host: str, port: int, public_only: bool) -> tuple[str, int]:
    """The first address of a host, after all of them were checked."""
    found = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    refused = [address for address in found if public_only and not is_public(address)]
    if refused:
        raise ValueError(f"{host} is at {refused[0]}, which is not a public address; send the image itself")
    return found[0], port


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, also if it is written inside another."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if any(parsed in network for network in TUNNELS if parsed.version == network.version):
        return False
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    return parsed.is_global and not parsed.is_multicast


def _shut(sock: socket.socket):
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:  # closed already
        pass
