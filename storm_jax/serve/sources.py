"""Where the media of a request come from: data URLs, and files and servers that were allowed."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import ipaddress
import pathlib
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from urllib.parse import quote, unquote, urljoin, urlsplit

from storm_jax.serve.errors import ApiError
from storm_jax.serve.fields import from_base64
from storm_jax.serve.limits import Limits
from storm_jax.serve.sockets import shut

_DATA = re.compile(r"data:(image|video)/([\w.+-]+);base64,(.*)", re.DOTALL)
_REDIRECTS = 3
_CHUNK = 2**16
# Parsers disagree about these; the rest of the world does not use them in URLs.
_STRANGE = re.compile(r"[\\\s\x00-\x1f\x7f]")


@dataclasses.dataclass(frozen=True)
class Source:
    """The bytes of one medium; several are the frames of a video, each an image file."""

    files: tuple[bytes, ...]

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.files))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sources:
    """Reads what URLs name.

    Attributes:
      folder: files below it may be named by `file:` URLs; None forbids them.
      domains: hosts from which media are downloaded, such as "example.org"; ".example.org" allows all below it.
    """

    limits: Limits
    folder: pathlib.Path | None = None
    domains: Sequence[str] = ()

    def read(self, url: str, kind: str, field: str) -> Source:
        """Reads a medium; it waits for the network at most `fetch_seconds`.

        Args:
          kind: "image" or "video".
          field: of the request, for messages.

        Raises:
          ApiError: the URL is not allowed, or cannot be read.
        """
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            return self._data(url, kind, field)
        if _STRANGE.search(url):
            raise ApiError(
                400, f"{field} contains a backslash, a space or a control character", field
            )
        if scheme == "file":
            return Source((self._file(url, field),))
        if scheme in ("http", "https"):
            return Source((self._download(url, field),))
        raise ApiError(400, f"{field}: use a data:, https:, http: or file: URL", field)

    def _data(self, url: str, kind: str, field: str) -> Source:
        match = _DATA.fullmatch(url)
        if not match:
            raise ApiError(400, f"{field}: a data URL starts with data:{kind}/TYPE;base64,", field)
        found, subtype, text = match.groups()
        if found != kind:
            raise ApiError(400, f"{field} is data of kind {found}, and not {kind}", field)
        parts = text.split(",") if (kind, subtype) == ("video", "jpeg") else [text]
        if len(parts) > self.limits.listed_frames:
            limit = self.limits.listed_frames
            raise ApiError(
                400, f"{field} lists {len(parts):,} frames; {limit:,} are allowed", field
            )
        return Source(tuple(from_base64(part, field) for part in parts))

    def _file(self, url: str, field: str) -> bytes:
        if self.folder is None:
            raise ApiError(
                400, f"{field}: this server reads no files (--allowed_media_folder)", field
            )
        try:
            parts = urlsplit(url)
            if parts.netloc not in ("", "localhost"):
                raise ApiError(400, f"{field}: a file: URL has no host", field)
            path = pathlib.Path(unquote(parts.path)).resolve(strict=True)  # follows links
            if not path.is_relative_to(self.folder.resolve()):
                raise ApiError(400, f"{field} is not below the allowed folder", field)
            if not path.is_file():  # a device or a pipe may never end
                raise ApiError(400, f"{field} is not a file", field)
            with path.open("rb") as file:
                content = file.read(self.limits.media_bytes + 1)
        except (OSError, ValueError, RuntimeError):
            raise ApiError(400, f"{field}: no such file below the allowed folder", field) from None
        self._check_size(len(content), field)
        return content

    def _download(self, url: str, field: str) -> bytes:
        deadline = time.monotonic() + self.limits.fetch_seconds
        try:
            for _ in range(1 + _REDIRECTS):
                with self._response(url, field, deadline) as response:
                    location = response.headers.get("Location")
                    if response.status in (301, 302, 303, 307, 308) and location:
                        url = urljoin(url, location)
                        continue
                    if response.status != 200:
                        status = response.status
                        raise ApiError(422, f"{field}: its server answered with {status}", field)
                    return self._body(response, field, deadline)
        except (OSError, ValueError, http.client.HTTPException):
            reason = "timed out" if time.monotonic() >= deadline else "failed"
            raise ApiError(422, f"{field}: the download {reason}", field) from None
        raise ApiError(422, f"{field} is redirected more than {_REDIRECTS} times", field)

    @contextlib.contextmanager
    def _response(
        self, url: str, field: str, deadline: float
    ) -> Iterator[http.client.HTTPResponse]:
        """The response of a host that is allowed, from an address that was checked."""
        host, port, target, is_tls = self._parsed(url, field)
        address = _public_address(host, port, field)
        left = max(0.01, deadline - time.monotonic())
        kind = http.client.HTTPSConnection if is_tls else http.client.HTTPConnection
        connection = kind(host, port)
        raw: socket.socket = socket.create_connection(address[:2], timeout=left)
        # The socket's timeout is that of one read, and a server may send byte by byte.
        timer = threading.Timer(left, lambda: shut(raw))
        timer.start()
        try:
            if is_tls:
                context = ssl.create_default_context()
                raw = context.wrap_socket(raw, server_hostname=host)
            connection.sock = raw
            connection.request("GET", target, headers={"Accept": "*/*", "Connection": "close"})
            yield connection.getresponse()
        finally:
            timer.cancel()
            connection.close()
            raw.close()

    def _parsed(self, url: str, field: str) -> tuple[str, int, str, bool]:
        if _STRANGE.search(url):
            raise ApiError(400, f"{field}: a redirect contains a strange character", field)
        try:
            parts = urlsplit(url)
            host = (parts.hostname or "").rstrip(".").lower()
            port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
        except ValueError:
            raise ApiError(400, f"{field} is not a URL", field) from None
        if not port or not host:
            raise ApiError(400, f"{field}: only http: and https: URLs are downloaded", field)
        if "@" in parts.netloc:
            raise ApiError(400, f"{field} contains a user name", field)
        if not any(_is_in(host, domain) for domain in self.domains):
            raise ApiError(
                400, f"{field}: {host} is not an allowed host (--allowed_media_domains)", field
            )
        target = quote(parts.path, safe="/%:@!$&'()*+,;=~") or "/"
        return (
            host,
            port,
            f"{target}?{parts.query}" if parts.query else target,
            parts.scheme == "https",
        )

    def _body(self, response: http.client.HTTPResponse, field: str, deadline: float) -> bytes:
        content = bytearray()
        while chunk := response.read1(_CHUNK):
            content += chunk
            self._check_size(len(content), field)
            if time.monotonic() >= deadline:
                raise TimeoutError
        if time.monotonic() >= deadline:
            raise TimeoutError
        return bytes(content)

    def _check_size(self, size: int, field: str) -> None:
        if size > self.limits.media_bytes:
            raise ApiError(422, f"{field} is larger than {self.limits.media_bytes:,} bytes", field)


# Addresses that contain one of IPv4, which may not be public: NAT64, 6to4, Teredo, and IPv4-compatible ones.
_TUNNELS = [
    ipaddress.ip_network(each) for each in ("64:ff9b::/96", "2002::/16", "2001::/32", "::/96")
]


def _is_in(host: str, domain: str) -> bool:
    domain = domain.lower()
    return host.endswith(domain) if domain.startswith(".") else host == domain


def _public_address(host: str, port: int, field: str) -> tuple:
    """An address of a host, if all of them are public: one that is not would be reached in our network's name."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ApiError(422, f"{field}: {host} is not known", field) from None
    addresses = [address for *_, address in found]
    for address in addresses:
        if not is_public(str(address[0])):
            raise ApiError(400, f"{field}: {host} is not a public host", field)
    return addresses[0]


def is_public(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    if isinstance(parsed, ipaddress.IPv6Address) and (
        parsed.is_site_local or any(parsed in network for network in _TUNNELS)
    ):
        return False
    return (mapped or parsed).is_global and not (mapped or parsed).is_multicast
