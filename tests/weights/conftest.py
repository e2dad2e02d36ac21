"""A loopback server that behaves like the Hugging Face Hub and like plain hosts, well and badly."""

from __future__ import annotations

import hashlib
import http.server
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hosted:
    """One file of the server, and how badly it is served."""

    content: bytes
    etag: str | None = '"v1"'
    drop_after: list[int] = field(default_factory=list)  # bytes sent before the connection is cut, request by request
    status: list[int] = field(default_factory=list)  # statuses of the first requests
    ranges: bool = True
    chunked: bool = False
    slow: float = 0.0


class Server:
    """``server.files[path] = Hosted(...)``; ``server.log`` has (method, path, Range header or None)."""

    def __init__(self) -> None:
        self.files: dict[str, Hosted] = {}
        self.log: list[tuple[str, str, str | None]] = []
        self.tokens: dict[str, str | None] = {}
        self.redirects: dict[str, tuple[str, dict[str, str]]] = {}
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_HEAD(self):
                outer.answer(self, body=False)

            def do_GET(self):
                outer.answer(self, body=True)

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.httpd.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.httpd.server_address[1]}"

    def count(self, method: str = "GET", path: str | None = None) -> int:
        return Counter((m, p) for m, p, _ in self.log if path is None or p == path)[method, path] if path else sum(
            m == method for m, _, _ in self.log
        )  # fmt: skip

    def hub_file(self, repo: str, revision: str, file: str, content: bytes, commit: str = COMMIT) -> Hosted:
        """A large file as the Hub has it: a redirect with commit and hash, to another host with an ETag of its own."""
        sha256 = hashlib.sha256(content).hexdigest()
        blob = f"/cdn/{sha256}"
        headers = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
        self.redirects[f"/{repo}/resolve/{revision}/{file}"] = (blob, headers)
        self.files[blob] = Hosted(content, etag='"multipart-1"')
        return self.files[blob]

    def answer(self, request: http.server.BaseHTTPRequestHandler, body: bool) -> None:
        path = request.path
        self.log.append((request.command, path, request.headers.get("Range")))
        self.tokens[path] = request.headers.get("Authorization")
        if path in self.redirects:
            target, headers = self.redirects[path]
            request.send_response(302)
            # by another name, as the Hub redirects to another host
            request.send_header("Location", f"{self.url.replace('127.0.0.1', 'localhost')}{target}")
            for key, value in headers.items():
                request.send_header(key, value)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        hosted = self.files.get(path)
        status = hosted.status.pop(0) if hosted and hosted.status else 200 if hosted else 404
        if status != 200:
            request.send_response(status)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        content, start = hosted.content, 0
        wanted = request.headers.get("Range")
        same = request.headers.get("If-Range") in (None, hosted.etag)
        if wanted and hosted.ranges and same:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                request.send_response(416)
                request.send_header("Content-Range", f"bytes */{len(content)}")
                request.send_header("Content-Length", "0")
                request.end_headers()
                return
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            request.send_response(200)
        if hosted.etag:
            request.send_header("ETag", hosted.etag)
        if not hosted.chunked:
            request.send_header("Content-Length", str(len(content) - start))
        else:
            request.send_header("Connection", "close")
            request.close_connection = True
        request.end_headers()
        if not body:
            return
        payload = content[start:]
        cut = hosted.drop_after.pop(0) if hosted.drop_after else None
        if hosted.slow:
            time.sleep(hosted.slow)
        request.wfile.write(payload[:cut])
        if cut is not None:
            request.wfile.flush()
            request.close_connection = True


@pytest.fixture
def server():
    server = Server()
    yield server
    server.httpd.shutdown()
    server.httpd.server_close()


@pytest.fixture
def hosted():
    return Hosted


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    """Every test has empty caches of its own, no proxy, and no leave to be offline."""
    monkeypatch.setenv("S3PRL_SPEAKER_CACHE", str(tmp_path / "s3prl"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("no_proxy", "*")
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE",
                 "S3PRL_SPEAKER_OFFLINE"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    """Waits between tries take no time; gives the list of what would have been waited."""
    from s3prl_speaker_upstreams.weights import downloader, hub

    waited: list[float] = []
    monkeypatch.setattr(downloader, "sleep", waited.append)
    monkeypatch.setattr(hub, "sleep", waited.append)
    return waited
