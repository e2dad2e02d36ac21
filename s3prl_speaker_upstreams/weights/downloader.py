"""Downloading one file: resumed, checked, whole or not at all, and once however many processes ask for it."""

from __future__ import annotations

import functools
import http.client
import json
import logging
import os
import re
import socket
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import Any

from tqdm import tqdm

from .. import __version__
from ..common.digests import file_sha256
from ..common.files import locked, write_text
from ..errors import DownloadError

__all__ = ["TRANSIENT", "download", "http_message", "is_offline"]

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
_RETRIES = 5
_TIMEOUT = 30.0
# Worth another try: the server is busy or a proxy between failed.
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}


def is_offline() -> bool:
    """Whether the environment forbids the network (``HF_HUB_OFFLINE`` or ``S3PRL_SPEAKER_OFFLINE`` is set).

    >>> isinstance(is_offline(), bool)
    True
    """
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "S3PRL_SPEAKER_OFFLINE")
    return any(os.environ.get(name, "").strip().upper() in ("1", "ON", "YES", "TRUE") for name in names)


def _bar(description: str, total: int | None, initial: int = 0, show: bool = True) -> tqdm:
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit="B",
        unit_scale=True,
        delay=2,
        leave=False,
        disable=not show or not sys.stderr,
    )


@functools.lru_cache(maxsize=1)
def _certificates() -> ssl.SSLContext:
    """The system's certificates; where Python finds none (some builds of it), those of the certifi package."""
    context = ssl.create_default_context()
    if not context.get_ca_certs():
        try:
            import certifi
        except ImportError:
            return context
        context.load_verify_locations(certifi.where())
    return context


def _open(url: str, offset: int, validator: str | None) -> Any:
    """Open a URL, from byte `offset` if the file is still the one that had `validator` (an ETag or Last-Modified)."""
    request = urllib.request.Request(url)
    request.add_header("User-Agent", f"s3prl_speaker_upstreams/{__version__}")
    # A compressed transfer could not be resumed or compared with the size.
    request.add_header("Accept-Encoding", "identity")
    if offset:
        request.add_header("Range", f"bytes={offset}-")
        if validator:
            request.add_header("If-Range", validator)
    secure = urllib.request.HTTPSHandler(context=_certificates())
    return urllib.request.build_opener(secure).open(request, timeout=_TIMEOUT)


def download(
    url: str,
    target: str | os.PathLike,
    *,
    sha256: str | None = None,
    progress: bool = True,
    refresh: bool = False,
    remedy: str = "",
    retries: int = _RETRIES,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Download a URL to a file, which appears whole and checked or not at all.

    url, target : from and to; what has arrived of an interrupted download waits beside `target` and is continued
    sha256 : hexadecimal; without it the first download's is recorded in ``<target>.sha256``
    progress : a bar on the terminal, if the download takes over two seconds
    refresh : download again although the file is there
    remedy : appended to every error: what to do by hand
    retries : how often to try again after a transient failure without any progress (waits 0.5, 1, 2, ... seconds)
    check : called with the whole file before it takes its place; it raises to refuse it

    However many processes ask, one downloads and the others wait and find the file.

    Raises DownloadError: not found, refused, wrong checksum, no network, no space.

    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "a").write_bytes(b"weights")
    >>> download((folder / "a").as_uri(), folder / "b").read_bytes()
    b'weights'
    """
    target = Path(target)
    before = _stamp(target)
    try:
        with locked(f"{target}.lock", str(target), timeout=-1):
            # Who waited for the lock finds what the first has just fetched, also when all were told to refresh.
            if target.exists() and (not refresh or _stamp(target) != before):
                return target
            return _download_locked(url, target, sha256, progress, remedy, retries, check)
    except OSError as error:
        if isinstance(error, DownloadError):
            raise
        raise DownloadError(
            _with(f"{url}: cannot be stored as {target}: {error}; free space, or set the cache elsewhere", remedy)
        ) from error


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino


def _with(message: str, remedy: str) -> str:
    return f"{message}. {remedy}" if remedy else message


def _download_locked(
    url: str,
    target: Path,
    sha256: str | None,
    progress: bool,
    remedy: str,
    retries: int,
    check: Callable[[Path], None] | None,
) -> Path:
    part = target.with_name(f"{target.name}.part")
    note = target.with_name(f"{target.name}.part.json")
    _transfer(url, part, note, progress, remedy, retries, certain=sha256 is not None)
    found = file_sha256(part, "checking")
    if sha256 is not None and found != sha256.lower():
        size = part.stat().st_size
        _remove(part, note)
        raise DownloadError(
            _with(
                f"{url}: got a file of {size:,} bytes with sha256 {found}, expected {sha256}; it was removed: try "
                "again, and if this repeats the file has been changed or replaced on its way",
                remedy,
            )
        )
    if check is not None:
        try:
            check(part)
        except DownloadError as error:
            _remove(part, note)
            raise DownloadError(_with(str(error), remedy)) from error
    record = target.with_name(f"{target.name}.sha256")
    write_text(record, f"{found}  {target.name}\n")
    os.replace(part, target)
    _remove(note)
    logger.info("downloaded %s to %s (%s bytes, sha256 %s)", url, target, f"{target.stat().st_size:,}", found)
    return target


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _transfer(url: str, part: Path, note: Path, progress: bool, remedy: str, retries: int, certain: bool) -> None:
    """Bring the whole file into `part`, continuing what is there, through dropped connections.

    certain : a checksum will tell whether the parts fit, so continuing needs no promise of the server
    """
    failures = 0
    while True:
        offset, validator = _continuation(url, part, note, certain)
        size_before, nowhere = offset, False
        try:
            complete, problem = (
                _attempt(url, part, note, offset, validator, progress),
                "the connection was closed early",
            )
        except urllib.error.HTTPError as error:
            if error.code == 416 and offset:
                # What is there is not a beginning of what the server has: start over.
                _remove(part, note)
                complete, problem = False, "the server refused to continue"
            elif error.code in TRANSIENT:
                complete, problem = False, f"HTTP {error.code} {error.reason}"
            else:
                raise DownloadError(_with(http_message(url, error.code), remedy)) from error
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            if isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
                raise DownloadError(
                    _with(f"{url}: the server's certificate is not trusted: {error}", remedy)
                ) from error
            complete, problem = False, str(getattr(error, "reason", error) or type(error).__name__)
            nowhere = is_nowhere(error)
        if complete:
            return
        if part.exists() and part.stat().st_size > size_before:
            failures = 0  # it moves on: as many tries again
        failures += 1
        # A name that does not resolve means no network: one more try, not half a minute of them.
        if failures > (min(retries, 1) if nowhere else retries):
            have = f"; {part.stat().st_size:,} bytes are kept and will be continued" if part.exists() else ""
            raise DownloadError(_with(f"{url}: cannot be downloaded: {problem}{have}", remedy))
        wait = 0.5 * 2 ** (failures - 1)
        logger.warning("%s: %s; trying again in %.1f s", url, problem, wait)
        sleep(wait)


def is_nowhere(error: BaseException) -> bool:
    """Whether an error of urllib means that the server's name cannot be looked up.

    >>> is_nowhere(urllib.error.URLError(socket.gaierror(-2, "Name or service not known")))
    True
    """
    return isinstance(getattr(error, "reason", None), socket.gaierror)


def _continuation(url: str, part: Path, note: Path, certain: bool) -> tuple[int, str | None]:
    """Where to continue and the validator of the file begun; from the start if it cannot be told to be the same."""
    try:
        begun = json.loads(note.read_text(encoding="utf-8"))
        if begun["url"] == url and (begun["validator"] or certain) and part.stat().st_size:
            return part.stat().st_size, begun["validator"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    _remove(part, note)
    return 0, None


def _attempt(url: str, part: Path, note: Path, offset: int, validator: str | None, progress: bool) -> bool:
    """One request; True if the file is now whole."""
    with _open(url, offset, validator) as response:
        headers = response.headers
        etag, length = headers.get("ETag"), headers.get("Content-Length")
        if getattr(response, "status", 200) == 206 and offset:
            span = re.match(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
            changed = etag and validator and validator.startswith('"') and etag != validator
            if not span or int(span.group(1)) != offset or changed:
                _remove(part, note)
                return False
            total = int(span.group(2)) if span.group(2).isdigit() else None
        else:
            offset = 0
            total = int(length) if length and length.isdigit() else None
            # Only a strong ETag (or a date) lets a later request be sure that it continues the same file.
            strong = etag if etag and etag.startswith('"') else headers.get("Last-Modified")
            note.write_text(json.dumps({"url": url, "validator": strong}), encoding="utf-8")
        name = part.name.removesuffix(".part")
        with open(part, "ab" if offset else "wb") as file, _bar(name, total, offset, progress) as bar:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    size = part.stat().st_size
    if total is not None and size > total:
        _remove(part, note)
        return False
    return total is None or size == total


def http_message(url: str, status: int) -> str:
    """One sentence of what a server's refusal means.

    >>> http_message("http://x/y", 410)
    'http://x/y: HTTP 410 Gone: the file has been removed'
    """
    why = {
        401: "the server wants a log-in",
        403: "the server refuses access",
        404: "the file is not there (renamed or removed, or a wrong link)",
        410: "the file has been removed",
    }.get(status, "the server refuses")
    return f"{url}: HTTP {status} {http.client.responses.get(status, '')}: {why}"
