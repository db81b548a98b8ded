"""Downloads of addresses that strangers write: bounded in time and size, and public hosts alone."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from granulon.hub import fetch as module
from granulon.hub.fetch import fetch, is_public


class Site(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif self.path == "/drip":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self._drip(b"x")
        elif self.path == "/drip-headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            self._drip(b"X-Header: 1\r\n")
        elif self.path == "/cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"only this")
        elif self.path == "/missing":
            self.send_error(404)
        else:
            data = b"y" * 3000
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def _drip(self, piece):
        for _ in range(200):
            try:
                self.wfile.write(piece)
                self.wfile.flush()
            except OSError:
                return
            time.sleep(0.05)


@pytest.fixture(scope="module")
def site():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_address_gives_its_bytes_also_after_a_redirect(site):
    assert fetch(f"{site}/image") == b"y" * 3000
    assert fetch(f"{site}/to/{site}/image") == b"y" * 3000
    assert fetch(f"{site}/to//image") == b"y" * 3000


@pytest.mark.parametrize("path", ["/drip", "/drip-headers"])
def test_a_server_that_drips_is_cut_off_in_time(path, site):
    start = time.monotonic()
    with pytest.raises(ValueError, match="cannot be fetched: it took too long"):
        fetch(site + path, seconds=0.5)
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    "path, message",
    [
        ("/image", "larger than 2000 bytes"),
        ("/missing", "status 404"),
        ("/cut", "cannot be fetched: IncompleteRead"),
        ("/to/ftp://example.org/x", "is not an http"),
        ("/to/file:///etc/passwd", "is not an http"),
    ],
)
def test_what_is_not_a_small_whole_file_is_refused(path, message, site):
    with pytest.raises(ValueError, match=message):
        fetch(site + path, max_bytes=2000)


def test_redirects_end(site):
    with pytest.raises(ValueError, match="more than 3 redirects"):
        fetch(f"{site}/to/{site}/to/{site}/to/{site}/to/{site}/image")


PRIVATE = (
    "127.0.0.1 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 255.255.255.255 ::1 :: "
    "fe80::1 fe80::1%eth0 fc00::1 ff02::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::7f00:1 2002:7f00:1:: 2001::1"
).split()


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public_are_known(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses_are_known(address):
    assert is_public(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "127.1"])
def test_no_way_of_writing_a_private_host_is_fetched(host, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("connected"))
    with pytest.raises(ValueError, match="not a public address|cannot be fetched"):
        fetch(f"http://{host}/", public_only=True)


def as_resolved(monkeypatch, answers):
    """Names resolve to these addresses, in turn; the connection goes to the site, and is recorded."""
    asked, connected, connect, look_up = [], [], socket.create_connection, socket.getaddrinfo
    answers = iter(answers)

    def resolve(host, port, *args, **kwargs):
        if host == "127.0.0.1":
            return look_up(host, port, *args, **kwargs)
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in next(answers)]

    def create_connection(target, **kwargs):
        connected.append(target[0])
        return connect(("127.0.0.1", target[1]), **kwargs)

    monkeypatch.setattr(module.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(module.socket, "create_connection", create_connection)
    return asked, connected


def test_the_connection_goes_to_the_address_that_was_checked(site, monkeypatch):
    port = site.rpartition(":")[2]
    asked, connected = as_resolved(monkeypatch, [["93.184.216.34"], ["127.0.0.1"]])
    assert fetch(f"http://rebinding.example:{port}/image", public_only=True) == b"y" * 3000
    assert asked == ["rebinding.example"] and connected == ["93.184.216.34"]


def test_a_redirect_to_a_private_host_is_not_followed(site, monkeypatch):
    port = site.rpartition(":")[2]
    _, connected = as_resolved(monkeypatch, [["93.184.216.34"], ["169.254.169.254"]])
    with pytest.raises(ValueError, match="169.254.169.254, which is not a public address"):
        fetch(f"http://good.example:{port}/to/http://metadata.example/secret", public_only=True)
    assert connected == ["93.184.216.34"]


def test_one_private_address_among_public_ones_is_refused(monkeypatch):
    _, connected = as_resolved(monkeypatch, [["93.184.216.34", "10.0.0.1"]])
    with pytest.raises(ValueError, match="10.0.0.1, which is not a public address"):
        fetch("http://mixed.example/", public_only=True)
    assert not connected


def test_proxies_of_the_environment_are_not_used(site, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert fetch(f"{site}/image") == b"y" * 3000
