"""Downloads from a server on this machine: whole and with the right checksum, or not at all."""

from __future__ import annotations

import gzip
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fastm2rec.data import DataError, download, read_log
from fastm2rec.data.download import PUBLISHED, Published

CONTENT = gzip.compress(b"u1 a b c\nu2 a b\n", mtime=0)
SHA256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"


class Server(ThreadingHTTPServer):
    """Serves two files, one of them cut off, and keeps the paths that were asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []

    def published(self, name: str, checksum: str | None = SHA256) -> Published:
        return Published(f"http://127.0.0.1:{self.server_address[1]}/{name}", checksum, "none")


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if self.path not in ("/user_sequence.txt.gz", "/cut.gz"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT if self.path != "/cut.gz" else CONTENT[:-5])

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("checksum", [SHA256, MD5])
def test_a_file_is_fetched_once(server: Server, tmp_path: Path, checksum: str) -> None:
    published = server.published("user_sequence.txt.gz", checksum)
    path = download("x", tmp_path / "new", published)
    assert path == tmp_path / "new" / "user_sequence.txt.gz"
    assert path.read_bytes() == CONTENT
    assert len(read_log(path)) == 5
    assert download("x", tmp_path / "new", published) == path
    assert server.requests == ["/user_sequence.txt.gz"]
    assert _files(tmp_path) == [path]


def test_a_damaged_copy_is_fetched_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "user_sequence.txt.gz").write_bytes(CONTENT[:-1])
    assert download("x", tmp_path, server.published("user_sequence.txt.gz")).read_bytes() == CONTENT
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("name", "checksum", "message"),
    [
        ("user_sequence.txt.gz", "sha256:" + "0" * 64, "x: http.*/user_sequence.txt.gz was not kept: .*hash"),
        ("user_sequence.txt.gz", "md5:" + "0" * 32, "x: http.*/user_sequence.txt.gz was not kept: .*hash"),
        ("absent.gz", SHA256, "x: cannot fetch http.*/absent.gz: 404"),
        ("cut.gz", SHA256, "x: cannot fetch http.*/cut.gz: .*"),
    ],
)
def test_what_failed_leaves_nothing(server: Server, tmp_path: Path, name: str, checksum: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        download("x", tmp_path, server.published(name, checksum))
    assert server.requests == [f"/{name}"]
    assert _files(tmp_path) == []


def test_without_a_checksum_nothing_is_fetched(server: Server, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="x: no checksum of http.* is known, so it is not fetched; .*pass its folder as --data"
    ):
        download("x", tmp_path, server.published("user_sequence.txt.gz", None))
    assert server.requests == []
    with pytest.raises(DataError, match="gowalla: no checksum of https://snap.stanford.edu.*cite Cho"):
        download("gowalla", tmp_path)
    with pytest.raises(DataError, match="download: expected one of ml-100k, ml-1m, gowalla, got 'netflix'"):
        download("netflix", tmp_path)
    assert _files(tmp_path) == []


def test_no_server_and_no_place(server: Server, tmp_path: Path) -> None:
    published = server.published("user_sequence.txt.gz")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="x: http.* was not kept: "):
        download("x", tmp_path / "file", published)
    server.server_close()
    with pytest.raises(DataError, match="x: cannot fetch http"):
        download("x", tmp_path, published)


def test_what_is_published_is_named_as_the_readers_look_for_it() -> None:
    for name, published in PUBLISHED.items():
        assert published.url.startswith("https://")
        assert published.licence
        if published.checksum is not None:
            kind, _, value = published.checksum.partition(":")
            assert len(value) == 2 * hashlib.new(kind).digest_size
            assert name in published.url
