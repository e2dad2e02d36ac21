"""One file over a bad network: resumed, checked, whole or not at all, once for many processes."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from s3prl_speaker_upstreams.errors import DownloadError
from s3prl_speaker_upstreams.weights import download

pytestmark = pytest.mark.compat
CONTENT = random.Random(0).randbytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def left(target):
    """What lies beside a target, locks apart."""
    return sorted(p.name for p in target.parent.iterdir() if not p.name.endswith(".lock"))


def test_plain(server, hosted, tmp_path):
    server.files["/model.pt"] = hosted(CONTENT)
    target = download(f"{server.url}/model.pt", tmp_path / "d" / "model.pt", sha256=SHA256)
    assert target.read_bytes() == CONTENT
    assert left(target) == ["model.pt", "model.pt.sha256"]
    assert (target.parent / "model.pt.sha256").read_text().split() == [SHA256, "model.pt"]
    download(f"{server.url}/model.pt", target, sha256=SHA256)
    assert server.count("GET") == 1  # what is there is not asked for again
    server.files["/model.pt"].content = b"newer"
    download(f"{server.url}/model.pt", target, refresh=True)
    assert target.read_bytes() == b"newer"


@pytest.mark.parametrize("chunked", [False, True])
def test_sizes_unknown_beforehand(server, hosted, tmp_path, chunked):
    server.files["/x"] = hosted(CONTENT, etag=None, chunked=chunked)
    assert download(f"{server.url}/x", tmp_path / "x", sha256=SHA256).read_bytes() == CONTENT


def test_dropped_connections_are_continued(server, hosted, tmp_path, quick):
    server.files["/x"] = hosted(CONTENT, drop_after=[1_000_000, 500_000, 0])
    assert download(f"{server.url}/x", tmp_path / "x").read_bytes() == CONTENT
    ranges = [r for _, _, r in server.log]
    assert ranges[0] is None and ranges[1] == "bytes=1000000-" and ranges[2] == ranges[3] == "bytes=1500000-"
    # Progress starts the waiting anew; the drop without any waits once more.
    assert quick == [0.5, 0.5, 1.0] or quick == [0.5, 0.5, 0.5]


def test_an_interrupted_download_is_continued_by_the_next_run(server, hosted, tmp_path, quick):
    server.files["/x"] = hosted(CONTENT, drop_after=[1_000_000], status=[])
    server.files["/x"].status = [200, 503, 503, 503]
    with pytest.raises(DownloadError, match=r"HTTP 503.*1,000,000 bytes are kept"):
        download(f"{server.url}/x", tmp_path / "x", retries=2)
    assert left(tmp_path / "x") == ["x.part", "x.part.json"]
    assert download(f"{server.url}/x", tmp_path / "x").read_bytes() == CONTENT
    assert server.log[-1][2] == "bytes=1000000-"
    assert left(tmp_path / "x") == ["x", "x.sha256"]


@pytest.mark.parametrize("etag", ['"v2"', 'W/"v1"', None])
def test_another_file_is_not_appended_to_the_first(server, hosted, tmp_path, quick, etag):
    server.files["/x"] = hosted(b"a" * 2_000_000, etag='"v1"' if etag == '"v2"' else etag, drop_after=[1_000_000])
    server.files["/x"].status = [200, 500, 500]
    with pytest.raises(DownloadError):
        download(f"{server.url}/x", tmp_path / "x", retries=1)
    server.files["/x"] = hosted(CONTENT, etag=etag)
    assert download(f"{server.url}/x", tmp_path / "x").read_bytes() == CONTENT


def test_a_server_without_ranges(server, hosted, tmp_path, quick):
    server.files["/x"] = hosted(CONTENT, ranges=False, drop_after=[1_000_000])
    assert download(f"{server.url}/x", tmp_path / "x").read_bytes() == CONTENT


def test_a_part_that_is_too_long(server, hosted, tmp_path, quick):
    (tmp_path / "x.part").write_bytes(CONTENT + b"more")
    (tmp_path / "x.part.json").write_text(f'{{"url": "{server.url}/x", "validator": "\\"v1\\""}}')
    server.files["/x"] = hosted(CONTENT)
    assert download(f"{server.url}/x", tmp_path / "x").read_bytes() == CONTENT


def test_wrong_checksum(server, hosted, tmp_path):
    server.files["/x"] = hosted(CONTENT)
    wrong = "0" * 64
    with pytest.raises(DownloadError, match=rf"sha256 {SHA256}, expected {wrong}; it was removed.*put it by hand"):
        download(f"{server.url}/x", tmp_path / "x", sha256=wrong, remedy="put it by hand")
    assert left(tmp_path / "x") == []


@pytest.mark.parametrize(
    ("status", "message", "requests"),
    [(404, "the file is not there", 1), (403, "refuses access", 1), (401, "log-in", 1), (503, "HTTP 503", 3)],
)
def test_http_errors(server, hosted, tmp_path, quick, status, message, requests):
    server.files["/x"] = hosted(CONTENT, status=[status] * 9)
    with pytest.raises(DownloadError, match=message) as caught:
        download(f"{server.url}/x", tmp_path / "x", retries=2, remedy="do this")
    assert str(caught.value).endswith("do this")
    assert server.count("GET") == requests
    assert left(tmp_path / "x") == []


def test_passing_errors_are_tried_again(server, hosted, tmp_path, quick):
    server.files["/x"] = hosted(CONTENT, status=[503, 429])
    assert download(f"{server.url}/x", tmp_path / "x").read_bytes() == CONTENT
    assert quick == [0.5, 1.0]


def test_nobody_listens(server, tmp_path, quick):
    server.httpd.shutdown()
    server.httpd.server_close()
    with pytest.raises(DownloadError, match="refused.*do this"):
        download(f"{server.url}/x", tmp_path / "x", retries=1, remedy="do this")


def test_a_place_that_cannot_be_written(server, hosted, tmp_path):
    server.files["/x"] = hosted(CONTENT)
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="cannot be stored"):
        download(f"{server.url}/x", tmp_path / "file" / "x")


WORKER = """
import sys
from s3prl_speaker_upstreams.weights import download
print(len(download(sys.argv[1], sys.argv[2], sha256=sys.argv[3]).read_bytes()))
"""


def test_eight_processes_one_download(server, hosted, tmp_path):
    server.files["/x"] = hosted(CONTENT, slow=0.5)
    command = [sys.executable, "-c", WORKER, f"{server.url}/x", str(tmp_path / "x"), SHA256]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) for _ in range(8)]
    outputs = [worker.communicate(timeout=60)[0].strip() for worker in workers]
    assert outputs == [str(len(CONTENT))] * 8
    assert all(worker.returncode == 0 for worker in workers)
    assert server.count("GET") == 1


def test_of_many_that_refresh_at_once_one_downloads(server, hosted, tmp_path):
    server.files["/x"] = hosted(CONTENT, slow=0.3)
    (tmp_path / "x").write_bytes(b"old")
    barrier = threading.Barrier(4)

    def work(_):
        barrier.wait()
        return download(f"{server.url}/x", tmp_path / "x", refresh=True).read_bytes()

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(work, range(4))) == {CONTENT}
    assert server.count("GET") == 1


def test_a_killed_process_leaves_no_lock_behind(server, hosted, tmp_path):
    server.files["/x"] = hosted(CONTENT, slow=30.0)
    command = [sys.executable, "-c", WORKER, f"{server.url}/x", str(tmp_path / "x"), SHA256]
    worker = subprocess.Popen(command, env=os.environ)
    while not server.count("GET"):
        assert worker.poll() is None
    worker.kill()
    worker.wait()
    server.files["/x"] = hosted(CONTENT)
    assert download(f"{server.url}/x", tmp_path / "x", sha256=SHA256).read_bytes() == CONTENT
