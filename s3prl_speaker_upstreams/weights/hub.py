"""Files of the Hugging Face Hub, through its own library: its cache, tokens, proxies and transfers are its own."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from time import sleep

from .. import __version__
from ..errors import DownloadError
from .downloader import TRANSIENT, http_message
from .registry import PublicCheckpoint

__all__ = ["NotAHub", "hub_cache_folder", "hub_cached", "hub_download", "hub_location"]

logger = logging.getLogger(__name__)

HUB = "https://huggingface.co"
_URL = re.compile(r"https?://[^/]+/([^/]+/[^/]+)/(?:resolve|blob|raw)/([^/]+)/([^?#]+)")
_TRIES = 4


class NotAHub(Exception):
    """The server has the file but does not speak the Hub's protocol: a plain mirror."""


def hub_cache_folder() -> Path:
    """Hugging Face's cache folder, found as its own library finds it, at every call.

    >>> hub_cache_folder().is_absolute() or bool(os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME"))
    True
    """
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.path.expandvars(os.environ[name])).expanduser()
    home = os.environ.get("HF_HOME")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return Path(os.path.expandvars(home)).expanduser() / "hub"


def hub_location(url: str) -> tuple[str, str, str] | None:
    """Repository, revision and file of a link to a file of the Hub, also one copied from the browser; else None.

    >>> hub_location("https://huggingface.co/org/model/blob/main/a/model.pt")
    ('org/model', 'main', 'a/model.pt')
    """
    found = _URL.match(url)
    hosts = ("huggingface.co", "hf.co", urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or HUB).hostname)
    if not found or urllib.parse.urlsplit(url).hostname not in hosts:
        return None
    repo, revision, file = (urllib.parse.unquote(group) for group in found.groups())
    return repo, revision, file


def hub_cached(entry: PublicCheckpoint) -> Path | None:
    """The entry's file in the Hub's cache, whoever put it there, or None; never uses the network.

    >>> from s3prl_speaker_upstreams.weights import lookup
    >>> hub_cached(lookup("ecapa_tdnn")) is None or hub_cached(lookup("ecapa_tdnn")).is_file()
    True
    """
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(str(entry.repo), entry.file, cache_dir=hub_cache_folder(), revision=entry.revision)
    return Path(found) if isinstance(found, str) else None


def hub_download(entry: PublicCheckpoint, *, endpoint: str | None, refresh: bool, progress: bool, remedy: str) -> Path:
    """Download an entry's file into the Hub's cache, or find it there.

    endpoint : in place of the environment's ``HF_ENDPOINT`` and of ``https://huggingface.co``
    refresh : download again
    progress : with bars
    remedy : ends the message of every error

    Raises NotAHub where the server is a plain mirror; DownloadError if the file cannot be had.

    >>> from s3prl_speaker_upstreams.weights import lookup
    >>> hub_download(lookup("ecapa_tdnn"), endpoint=None, refresh=False, progress=True, remedy="")  # doctest: +SKIP
    PosixPath('/home/me/.cache/huggingface/hub/models--speechbrain--spkrec-ecapa-voxceleb/snapshots/0f99f2d...')
    """
    from huggingface_hub import hf_hub_download

    server = (endpoint or os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    url = f"{server}/{entry.repo}/resolve/{entry.revision}/{entry.file}"
    _check_name(server, url, remedy)
    for attempt in range(_TRIES):
        try:
            with _bars(progress):
                return Path(
                    hf_hub_download(
                        str(entry.repo), entry.file, revision=entry.revision, endpoint=server,
                        cache_dir=hub_cache_folder(), force_download=refresh,
                        library_name="s3prl_speaker_upstreams", library_version=__version__,
                    )
                )  # fmt: skip
        except Exception as error:  # requests' or httpx's, by the library's version, and its own
            problem, final = _explain(url, error)
            if final or attempt == _TRIES - 1:
                raise DownloadError(f"{problem}. {remedy}") from error
            wait = 0.5 * 2**attempt
            logger.warning("%s; trying again in %.1f s", problem, wait)
            sleep(wait)
    raise AssertionError("the last try returns or raises")


def _check_name(server: str, url: str, remedy: str) -> None:
    """Where the server's name is not known there is no network: said at once, not after the library's half minute."""
    parts = urllib.parse.urlsplit(server)
    host = parts.hostname or ""
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return  # the proxy looks names up
    try:
        socket.getaddrinfo(host, parts.port or parts.scheme)
    except OSError as error:
        raise DownloadError(f"{url}: cannot be reached: {error}. {remedy}") from error


def _explain(url: str, error: Exception) -> tuple[str, bool]:
    """What went wrong, in a sentence, and whether another try is useless.

    Raises NotAHub for an answer without the Hub's headers.
    """
    from huggingface_hub.errors import FileMetadataError

    causes = list(_causes(error))
    if any(isinstance(cause, FileMetadataError) for cause in causes):
        raise NotAHub(url) from error
    for cause in causes:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return http_message(url, status), status not in TRANSIENT
    # What the first cause says is the reason; what the library makes of it is about itself.
    first = causes[-1]
    if isinstance(first, OSError) and first.filename is not None:
        return f"{url}: cannot be stored in {hub_cache_folder()}: {first}", True
    return f"{url}: cannot be reached: {first or type(first).__name__}", isinstance(first, socket.gaierror)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


@contextlib.contextmanager
def _bars(show: bool) -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if show or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
