"""From an entry name or URL to a file on this machine: what ships, what is cached, what must be downloaded.

Where files are: those of the Hugging Face Hub in its own cache (:mod:`.hub`); all others in s3prl's download folder
(``S3PRL_SPEAKER_CACHE``, else ``~/.cache/s3prl/download``) under s3prl's names. A file that was put by hand into
``<that folder>/<entry name>/`` comes before both. The folders may be shared, read-only or somebody else's: what is in
them is used, and what cannot be done there is said.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import urllib.parse
import zipfile
from collections.abc import Iterator
from pathlib import Path

from ..common.digests import file_sha256
from ..common.files import locked, write_json
from ..errors import ConfigError, DownloadError, SpeakerUpstreamError
from .downloader import download, is_offline
from .hub import NotAHub, hub_cache_folder, hub_cached, hub_download, hub_location
from .registry import REGISTRY, SHIPPED_FOLDER, PublicCheckpoint, lookup

__all__ = ["by_hand_path", "cache_folder", "cached", "hub_cache_folder", "resolve"]

logger = logging.getLogger(__name__)

_SHA256 = re.compile(r"[0-9a-f]{64}")
# A zip may say how large its members are only to fill the disk; the largest public checkpoint has 765 MB.
_LARGEST_MEMBER = 4 << 30


def cache_folder() -> Path:
    """Folder of everything that is not on the Hugging Face Hub: ``S3PRL_SPEAKER_CACHE``, else s3prl's own.

    >>> isinstance(cache_folder(), Path)
    True
    """
    chosen = os.environ.get("S3PRL_SPEAKER_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "s3prl" / "download"


def by_hand_path(entry: PublicCheckpoint) -> Path:
    """Where to put an entry's file by hand.

    >>> by_hand_path(lookup("ecapa_dino_sslsv")).parts[-2:]
    ('ecapa_dino_sslsv', 'model_avg.pt')
    """
    return cache_folder() / entry.name / entry.file


def resolve(
    name_or_url: str | PublicCheckpoint,
    refresh: bool = False,
    *,
    endpoint: str | None = None,
    progress: bool = True,
) -> Path:
    """File (or folder) of a named checkpoint or of a URL, downloaded if it is not on this machine yet.

    name_or_url : an entry of REGISTRY, or a URL of a checkpoint file or of a zip that holds one
    refresh : download again
    endpoint : in place of ``https://huggingface.co``; by default the environment's ``HF_ENDPOINT``
    progress : a bar on downloads of over two seconds

    Raises ConfigError for an unknown name; DownloadError, saying which file to put where, if it cannot be had.

    >>> from s3prl_speaker_upstreams.weights import REGISTRY
    >>> [resolve(name).exists() for name, entry in REGISTRY.items() if entry.shipped] in ([], [True], [True, True])
    True
    """
    entry = _entry(name_or_url)
    if not refresh:
        found = cached(entry)
        if found is not None:
            return found
    if entry.source == "shipped":
        return SHIPPED_FOLDER / entry.file
    remedy = _by_hand(entry)
    if entry.source == "manual":
        raise DownloadError(f"{entry.title} has no direct download link. {remedy}")
    if is_offline():
        raise DownloadError(
            f"{entry.title} is not on this machine and the environment forbids the network (HF_HUB_OFFLINE or "
            f"S3PRL_SPEAKER_OFFLINE is set). Unset it, or fetch the file elsewhere. {remedy}"
        )
    with _said_with(remedy):
        if entry.source == "hub":
            try:
                path = hub_download(entry, endpoint=endpoint, refresh=refresh, progress=progress, remedy=remedy)
            except NotAHub as mirror:
                # No commit to file it under: kept under the published address, where `cached` finds it from now on.
                logger.info("%s: is a plain mirror of the Hub", mirror)
                return _plain_download(str(mirror), entry, refresh, progress, remedy)
            return _verified_or_removed(path, entry)
        return _plain_download(entry.url, entry, refresh, progress, remedy)


def _plain_download(url: str, entry: PublicCheckpoint, refresh: bool, progress: bool, remedy: str) -> Path:
    path = download(
        url, _url_path(entry.url), sha256=None if entry.source == "zip" else entry.sha256,
        progress=progress, refresh=refresh, remedy=remedy, check=_check_is_no_page,
    )  # fmt: skip
    return _extracted(path, entry, refresh) if _is_archive(path) else path


def cached(name_or_url: str | PublicCheckpoint) -> Path | None:
    """Where a checkpoint already is on this machine, or None; never uses the network.

    Raises DownloadError if a cached file is not the one that was downloaded or published (its checksum differs).

    >>> cached("ecapa_dino_sslsv") is None or cached("ecapa_dino_sslsv").exists()
    True
    """
    entry = _entry(name_or_url)
    if entry.source == "shipped":
        path = SHIPPED_FOLDER / entry.file
        return path if path.is_file() else None
    with _said_with(_by_hand(entry)):
        by_hand = by_hand_path(entry)
        if entry.name in REGISTRY and by_hand.is_file():
            return _verified(by_hand, entry.sha256, entry)
        if entry.source == "manual":
            return None
        found = hub_cached(entry) if entry.source == "hub" else None
        if found is not None:
            return _verified(found, entry.sha256 or _blob_sha256(found), entry)
        path = _url_path(entry.url)
        if not path.is_file():
            return None
        if _is_archive(path):
            return _extracted(path, entry)
        return _verified(path, entry.sha256 or _recorded(path), entry)


@contextlib.contextmanager
def _said_with(remedy: str) -> Iterator[None]:
    """Errors of the file system (a cache that is read-only or somebody else's, a full disk) become ours."""
    try:
        yield
    except SpeakerUpstreamError:
        raise
    except OSError as error:
        raise DownloadError(
            f"{error.filename or 'the cache'}: {error.strerror or error}; set S3PRL_SPEAKER_CACHE and HF_HUB_CACHE to "
            f"folders of your own. {remedy}"
        ) from error


def _entry(name_or_url: str | PublicCheckpoint) -> PublicCheckpoint:
    if isinstance(name_or_url, PublicCheckpoint):
        return name_or_url
    text = str(name_or_url)
    if "://" not in text:
        return lookup(text)
    parts = urllib.parse.urlsplit(text)
    if parts.scheme not in ("http", "https"):
        raise ConfigError(f"got the URL {text}, expected http:// or https://; for a file here pass its path with -k")
    name = Path(urllib.parse.unquote(parts.path)).name or "download"
    if parts.hostname in ("drive.google.com", "docs.google.com"):
        raise DownloadError(
            f"{text}: Google Drive gives no direct link; download the file in a browser and pass it with -k PATH"
        )
    location = hub_location(text)
    if location is not None:
        repo, revision, file = location
        return PublicCheckpoint(text, file, "hub", text, file, "", repo=repo, revision=revision)
    return PublicCheckpoint(text, name, "url", text, name, "")


def _by_hand(entry: PublicCheckpoint) -> str:
    """The sentence that tells how to go on without this program's download."""
    size = f" ({entry.size_text})" if entry.size else ""
    if entry.name not in REGISTRY:
        return f"Or download {entry.url} by other means and pass the file with -k PATH (ckpt=PATH)"
    also = " (with config.yaml beside it)" if entry.format == "wespeaker" else ""
    return (
        f"By hand: get {entry.file}{size}{also} from {entry.url} and put it at {by_hand_path(entry)}, "
        f"or pass it with -k PATH (ckpt=PATH) to -u {entry.name}"
    )


# --- checksums -------------------------------------------------------------------------------------------------------


def _recorded(path: Path) -> str | None:
    try:
        word = path.with_name(f"{path.name}.sha256").read_text(encoding="ascii").split()[0]
    except (OSError, IndexError, UnicodeDecodeError):
        return None
    return word if _SHA256.fullmatch(word) else None


def _verified(path: Path, sha256: str | None, entry: PublicCheckpoint) -> Path:
    """The path, if its checksum is as expected. A file is hashed once; its size and time tell if it was changed."""
    if sha256 is None:
        return path
    status = path.stat()
    now = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": sha256.lower()}
    key = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:32]
    stamp = cache_folder() / ".verified" / f"{key}.json"
    try:
        if json.loads(stamp.read_text(encoding="utf-8")) == now:
            return path
    except (OSError, ValueError):
        pass
    found = file_sha256(path, "checking")
    if found != sha256.lower():
        raise DownloadError(
            f"{path}: got a file of {status.st_size:,} bytes with sha256 {found}, expected {sha256} ({entry.title}); "
            "it is damaged or was changed: delete it (or pass refresh=True, command line: fetch --refresh) to fetch it "
            "again, or pass another file with -k PATH"
        )
    try:
        write_json(stamp, now)
    except OSError as error:
        logger.debug("%s: not noted as checked: %s", path, error)
    return path


def _blob_sha256(path: Path) -> str | None:
    """Checksum of a large file of the Hub's cache: the name of the blob that it links to."""
    blob = path.resolve().name
    return blob if _SHA256.fullmatch(blob) else None


def _verified_or_removed(path: Path, entry: PublicCheckpoint) -> Path:
    """A fresh file of the Hub's cache, whose library checks its size only; another one than expected does not stay."""
    try:
        return _verified(path, entry.sha256 or _blob_sha256(path), entry)
    except DownloadError:
        for stale in {path.resolve(), path}:
            stale.unlink(missing_ok=True)
        raise


def _check_is_no_page(path: Path) -> None:
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise DownloadError(f"{path.name}: the server sent an empty file")
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise DownloadError(f"{path.name}: the server sent a web page instead of the file; open the link in a browser")
    if start.startswith(b"{") or head.startswith(b"version https://git-lfs"):
        raise DownloadError(
            f"{path.name}: the server sent a message instead of the file: {head[:120].decode('utf-8', 'replace')!r}"
        )


# --- other files -----------------------------------------------------------------------------------------------------


def _url_path(url: str) -> Path:
    """Name of a download in s3prl's folder: the hash of its URL, then the file's name."""
    parts = urllib.parse.urlsplit(url)
    query = urllib.parse.parse_qs(parts.query)
    # ModelScope and WeNet name the file in the query.
    name = next((query[key][0] for key in ("FilePath", "version") if query.get(key)), parts.path)
    name = re.sub(r"[^\w.+-]", "_", Path(urllib.parse.unquote(name)).name) or "download"
    return cache_folder() / f"{hashlib.sha256(url.encode()).hexdigest()}.{name}"


def _is_archive(path: Path) -> bool:
    """Whether a file is a zip that is not PyTorch's own container (which is a zip, too)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return not any(name.endswith("data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


def _extracted(archive: Path, entry: PublicCheckpoint, refresh: bool = False) -> Path:
    """Folder with the checkpoint and its configuration out of a downloaded zip; nothing else is unpacked.

    What is unpacked already is used as it is, which needs no right to write there.
    """
    folder = archive.with_name(f"{archive.name}.unpacked")
    # Of many that refresh at once, those behind the first find a folder younger than the archive.
    if folder.is_dir() and (not refresh or folder.stat().st_mtime_ns >= archive.stat().st_mtime_ns):
        return folder
    try:
        with locked(f"{archive}.lock", str(archive), timeout=-1):
            if folder.is_dir():
                if not refresh or folder.stat().st_mtime_ns >= archive.stat().st_mtime_ns:
                    return folder
                shutil.rmtree(folder)
            beside = Path(tempfile.mkdtemp(prefix=f".{archive.name}.", dir=archive.parent))
            try:
                _unpack(archive, beside, entry)
                beside.chmod(0o777 & ~_umask())  # mkdtemp's are private; who shares the cache reads this, too
                os.replace(beside, folder)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    except zipfile.BadZipFile as error:
        raise DownloadError(f"{archive}: is a damaged zip ({error}); delete it to fetch it again") from error
    except PermissionError as error:
        raise DownloadError(
            f"{archive}: is downloaded, but may not be unpacked beside itself ({error.strerror}): the cache is "
            f"read-only or somebody else's. Unpack it elsewhere and pass the folder with -k PATH (ckpt=PATH) to -u "
            f"{entry.name}, or set S3PRL_SPEAKER_CACHE to a folder of your own"
        ) from error
    return folder


def _umask() -> int:
    mask = os.umask(0o022)  # it can only be read by setting it
    os.umask(mask)
    return mask


def _unpack(archive: Path, target: Path, entry: PublicCheckpoint) -> None:
    wanted = {entry.file, "config.yaml", "config.yml", "avg_model.pt", "model_avg.pt", "hyperparams.yaml"}
    weights = 0
    with zipfile.ZipFile(archive) as packed:
        for member in packed.infolist():
            # Only the last part of a member's name is used, so nothing can be written outside the folder.
            name = Path(member.filename.replace("\\", "/")).name
            if member.is_dir() or name not in wanted or stat.S_ISLNK(member.external_attr >> 16):
                continue
            if member.file_size > _LARGEST_MEMBER:
                raise DownloadError(f"{archive}: {member.filename} claims {member.file_size:,} bytes; refused")
            with packed.open(member) as source, open(target / name, "wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
            weights += not name.endswith((".yaml", ".yml"))
        if not weights:
            names = ", ".join(packed.namelist()[:5])
            raise DownloadError(f"{archive}: holds {names}, expected {entry.file}. {_by_hand(entry)}")
