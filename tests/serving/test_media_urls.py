"""What a URL may name: nothing but what was allowed, however it is spelled."""

from __future__ import annotations

import http.server
import os
import pathlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from serving.conftest import LIMITS

from storm_jax.serve import sources as sources_lib
from storm_jax.serve.errors import ApiError
from storm_jax.serve.sources import Sources, is_public

FIELD = "messages[0].content[0]"
CONTENT = b"a video"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by path; counts requests."""

    seen: list[str]
    pages: dict[str, Callable[[Handler], None]]

    def do_GET(self) -> None:
        self.seen.append(self.path)
        self.pages.get(self.path, Handler.missing)(self)

    def missing(self) -> None:
        self.send_error(404)

    def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def host() -> Iterator[tuple[str, type[Handler]]]:
    """(HOST:PORT, handler) of a server on this machine."""
    handler = type("H", (Handler,), {"seen": [], "pages": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"localhost:{server.server_port}", handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def reachable(monkeypatch) -> None:
    """Addresses of this machine count as public."""
    monkeypatch.setattr(sources_lib, "is_public", lambda address: address in ("127.0.0.1", "::1"))
    resolve = socket.getaddrinfo

    def only_ipv4(host, *rest, **options):
        return resolve("127.0.0.1" if host == "localhost" else host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", only_ipv4)


ALLOWED = Sources(limits=LIMITS, domains=("localhost", ".example.org"))


def read(url: str, sources: Sources = ALLOWED) -> bytes:
    (content,) = sources.read(url, "video", FIELD).files
    return content


def refused(url: str, sources: Sources = ALLOWED) -> ApiError:
    with pytest.raises(ApiError) as error:
        read(url, sources)
    assert error.value.param == FIELD and FIELD in error.value.message
    return error.value


def test_a_file_of_an_allowed_host_is_downloaded(host, reachable):
    address, handler = host
    handler.pages["/a.mp4?x=1"] = lambda self: self.answer(CONTENT)
    assert read(f"http://{address}/a.mp4?x=1") == CONTENT


def test_redirects_are_followed_to_allowed_hosts_only(host, reachable):
    address, handler = host
    handler.pages = {
        "/hop": lambda self: self.answer(b"", 302, Location="/end"),
        "/end": lambda self: self.answer(CONTENT),
        "/away": lambda self: self.answer(b"", 302, Location="http://evil.example/x"),
        "/inside": lambda self: self.answer(b"", 307, Location="http://169.254.169.254/x"),
        "/file": lambda self: self.answer(b"", 301, Location="file:///etc/passwd"),
        "/odd": lambda self: self.answer(b"", 301, Location=f"http://{address}\\@evil.example/"),
        "/loop": lambda self: self.answer(b"", 301, Location="/loop"),
        "/bracket": lambda self: self.answer(b"", 301, Location="http://["),
        "/%C3%A9": lambda self: self.answer(CONTENT),
    }
    assert read(f"http://{address}/hop") == CONTENT
    assert read(f"http://{address}/é") == CONTENT
    assert refused(f"http://{address}/bracket").status in (400, 422)
    assert "evil.example is not an allowed host" in refused(f"http://{address}/away").message
    assert "169.254.169.254 is not an allowed" in refused(f"http://{address}/inside").message
    assert "only http: and https:" in refused(f"http://{address}/file").message
    assert "strange character" in refused(f"http://{address}/odd").message
    handler.seen.clear()
    assert "redirected more than 3 times" in refused(f"http://{address}/loop").message
    assert len(handler.seen) == 4


@pytest.mark.parametrize(
    "url",
    [
        "http://evil.example/a",
        "http://localhost.evil.example/a",
        "http://evil.example#@localhost/a",
        "http://evil.example?@localhost/a",
        "http://xexample.org/a",
        "http://example.org/a",
        "http://[::1]/a",
        "http://0x7f000001/a",
        "http://2130706433/a",
        "http:///a",
        "http://:80/a",
    ],
)
def test_other_hosts_are_refused_before_anything_is_resolved(url, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", None)
    assert refused(url).status == 400


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://localhost\\@evil.example/a", "backslash"),
        ("http://evil.example\\.localhost/a", "backslash"),
        ("http://localhost/a\r\nHost: x", "control character"),
        ("http://local host/a", "a space"),
        ("http://user@localhost/a", "a user name"),
        ("http://evil.example@localhost/a", "a user name"),
        ("http://localhost:99999/a", "is not a URL"),
        ("http://[/a", "is not a URL"),
        ("gopher://localhost/a", "use a data:"),
        ("a.mp4", "use a data:"),
        ("", "use a data:"),
    ],
)
def test_strange_urls_are_refused(url, message):
    assert message in refused(url).message


def test_a_host_with_a_private_address_is_refused(host, monkeypatch):
    address, handler = host
    assert "localhost is not a public host" in refused(f"http://{address}/a").message
    found = [(0, 0, 0, "", ("93.184.216.34", 80)), (0, 0, 0, "", ("10.0.0.1", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert "is not a public host" in refused("http://a.example.org/a").message
    assert handler.seen == []


def test_the_address_that_was_checked_is_the_one_that_is_called(host, monkeypatch):
    """A name that resolves to another address the second time gains nothing."""
    address, handler = host
    handler.pages["/a"] = lambda self: self.answer(CONTENT)
    port = int(address.partition(":")[2])
    answers = iter([[(0, 0, 0, "", ("127.0.0.1", port))]])
    monkeypatch.setattr(sources_lib, "is_public", lambda _: True)
    resolve = socket.getaddrinfo

    def rebind(host, *rest, **options):
        if host == "a.example.org":
            return next(answers)
        return resolve(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebind)
    assert read(f"http://a.example.org:{port}/a") == CONTENT


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "0.0.0.0",
        "100.64.0.1", "224.0.0.1", "::1", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1",
        "::ffff:10.0.0.1", "::", "ff02::1", "64:ff9b::7f00:1", "2002:7f00:1::", "fec0::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not is_public(address)
    assert is_public("93.184.216.34") and is_public("2606:2800:220:1::1")


def test_a_download_is_cut_off_by_size_and_by_time(host, reachable, monkeypatch):
    address, handler = host
    limits = LIMITS.__class__(media_bytes=1000, fetch_seconds=0.5)
    sources = Sources(limits=limits, domains=("localhost",))

    def drip(self) -> None:
        self.send_response(200)
        self.end_headers()
        for _ in range(50):
            self.wfile.write(b"x")
            time.sleep(0.1)

    def drip_header(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        for _ in range(50):
            self.wfile.write(b"x")
            time.sleep(0.1)

    handler.pages = {
        "/header": drip_header,
        "/large": lambda self: self.answer(b"x" * 100_000),
        "/drip": drip,
        "/silent": lambda self: time.sleep(3),
        "/error": lambda self: self.answer(b"", 503),
    }
    error = refused(f"http://{address}/large", sources)
    assert error.status == 422 and "larger than 1,000 bytes" in error.message
    for page in ("/drip", "/header", "/silent"):
        began = time.monotonic()
        error = refused(f"http://{address}{page}", sources)
        assert error.status == 422 and "timed out" in error.message
        assert time.monotonic() - began < 2.5
    assert "answered with 503" in refused(f"http://{address}/error", sources).message
    assert "answered with 404" in refused(f"http://{address}/none", sources).message
    assert "the download failed" in refused("http://localhost:1/a", sources).message


@pytest.fixture
def folder(tmp_path) -> Sources:
    (tmp_path / "allowed").mkdir()
    (tmp_path / "allowed/a b.mp4").write_bytes(CONTENT)
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "allowed-too").mkdir()
    (tmp_path / "allowed-too/a.mp4").write_bytes(b"secret")
    (tmp_path / "allowed/link.mp4").symlink_to(tmp_path / "secret")
    (tmp_path / "allowed/loop").symlink_to(tmp_path / "allowed/loop")
    (tmp_path / "allowed/good.mp4").symlink_to(tmp_path / "allowed/a b.mp4")
    os.mkfifo(tmp_path / "allowed/pipe")
    return Sources(limits=LIMITS, folder=tmp_path / "allowed")


def test_files_below_the_folder_are_read(folder):
    assert read(f"file://{folder.folder}/a%20b.mp4", folder) == CONTENT
    assert read(f"file://localhost{folder.folder}/good.mp4", folder) == CONTENT


@pytest.mark.parametrize(
    "path",
    [
        "../secret", "%2e%2e/secret", "link.mp4", "../allowed-too/a.mp4", "loop", "pipe", "none",
        "", "%00", "a" * 5000, "\u2100",
    ],
)  # fmt: skip
def test_other_files_are_refused_without_their_names(folder, path):
    error = refused(f"file://{folder.folder}/{path}", folder)
    assert error.status == 400 and str(folder.folder) not in error.message


def test_files_and_hosts_are_refused_unless_they_are_allowed(folder):
    nothing = Sources(limits=LIMITS)
    assert "reads no files" in refused(f"file://{folder.folder}/good.mp4", nothing).message
    assert "not an allowed host" in refused("http://localhost/a", nothing).message
    assert "has no host" in refused("file://other/a", folder).message


def test_the_folder_itself_may_be_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder.folder)
    linked = Sources(limits=LIMITS, folder=pathlib.Path(tmp_path / "link"))
    assert read(f"file://{tmp_path}/link/good.mp4", linked) == CONTENT
