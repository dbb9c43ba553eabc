"""Cloud Storage in memory: the requests that TensorStore, gcsfs and google-cloud-storage send to it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

BUCKET = "bucket"
_NAME = re.compile(r"/+(upload/|download/)?storage/v1/b/([^/]+)(/o)?/?(.*)")


class FakeGcs(http.server.ThreadingHTTPServer):
    """One bucket.

    Attributes:
      objects: {key: (generation, content)}.
      bytes_read: of the contents of objects.
      forbidden: a pattern; objects whose key contains it cannot be written.
      is_closed: whether nothing can be read or written.
      refused: how often that has happened.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.bytes_read = 0
        self.open()
        self.uploads: list[str] = []
        self.lock = threading.Lock()

    @property
    def environment(self) -> dict[str, str]:
        """What leads the clients to this server."""
        url = f"http://127.0.0.1:{self.server_port}"
        return {
            "TENSORSTORE_GCS_HTTP_URL": url,
            "STORAGE_EMULATOR_HOST": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks another service
        }

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            self.shutdown()
            self.server_close()

    def open(self) -> None:
        """Refuses nothing."""
        self.forbidden, self.is_closed, self.refused = "$^", False, 0

    def handle_error(self, *_: Any) -> None:
        """Clients may close their connections."""

    def write(self, key: str, content: bytes) -> None:
        generation, _ = self.objects.get(key, (0, b""))
        self.objects[key] = generation + 1, content


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a reply is two writes
    server: FakeGcs

    def _serve(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind, bucket, objects, name = _NAME.fullmatch(url.path).groups()
        key = urllib.parse.unquote(name)
        with self.server.lock:
            if self.server.is_closed:
                self._refuse()
            elif bucket != BUCKET:
                self._reply(404)
            elif not objects:
                self._json({"name": bucket})
            elif kind == "upload/":
                self._upload(query, body)
            elif not key:
                self._list(query.get("prefix", ""), query.get("delimiter"))
            elif key not in self.server.objects:
                self._reply(404, b"No such object")
            elif self.command == "DELETE":
                del self.server.objects[key]
                self._reply(204)
            elif query.get("alt") == "media":
                self._read(key, query)
            else:
                self._json(self._facts(key))

    do_GET = do_POST = do_PUT = do_DELETE = _serve

    def _upload(self, query: dict[str, str], body: bytes) -> None:
        """In one request, or in two: a session is opened, then all bytes are sent."""
        key = query.get("name") or self.server.uploads[int(query["upload_id"])]
        if re.search(self.server.forbidden, key):
            self._refuse()
        elif query["uploadType"] == "resumable" and "upload_id" not in query:
            self.server.uploads.append(key)
            number = len(self.server.uploads) - 1
            self._reply(200, headers={"Location": f"{self._url}&upload_id={number}"})
        else:
            generation = str(self.server.objects.get(key, (0, b""))[0])
            if query.get("ifGenerationMatch", generation) != generation:
                self._reply(412)
            else:
                self.server.write(key, body)
                self._json(self._facts(key))

    @property
    def _url(self) -> str:
        where = self.path.partition("?")[0]
        return f"http://127.0.0.1:{self.server.server_port}{where}?uploadType=resumable"

    def _list(self, prefix: str, delimiter: str | None) -> None:
        items, folders = [], set()
        for key in sorted(key for key in self.server.objects if key.startswith(prefix)):
            head, found, _ = key[len(prefix) :].partition(delimiter or "\0")
            if found:
                folders.add(prefix + head + found)
            else:
                items.append(self._facts(key))
        self._json({"items": items, "prefixes": sorted(folders)})

    def _facts(self, key: str) -> dict[str, Any]:
        generation, content = self.server.objects[key]
        return {
            "bucket": BUCKET, "name": key, "size": str(len(content)), "generation": str(generation),
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "timeCreated": "2026-01-01T00:00:00Z", "updated": "2026-01-01T00:00:00Z",
        }  # fmt: skip

    def _read(self, key: str, query: dict[str, str]) -> None:
        generation, content = self.server.objects[key]
        headers = {"x-goog-generation": str(generation)}
        if query.get("ifGenerationNotMatch") == str(generation):
            self._reply(304, headers=headers)
            return
        size = len(content)
        if not (asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))):
            self.server.bytes_read += size
            self._reply(200, content, headers)
            return
        first = int(asked[1]) if asked[1] else max(size - int(asked[2]), 0)
        end = min(int(asked[2]) + 1, size) if asked[1] and asked[2] else size
        if first >= size:
            self._reply(416)
        else:
            self.server.bytes_read += end - first
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
            self._reply(206, content[first:end], headers)

    def _refuse(self) -> None:
        self.server.refused += 1
        self._reply(403)

    def _json(self, value: dict[str, Any]) -> None:
        self._reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Prints nothing."""
