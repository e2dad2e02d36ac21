"""From an entry name or URL to a file on this machine: what ships, what is cached, what must be downloaded.

Where files are: those of the Hugging Face Hub in its own cache, laid out as its tools do (``HF_HUB_CACHE``, else
``HF_HOME/hub``, else ``~/.cache/huggingface/hub``), so that either finds the other's; all others in s3prl's download
folder (``S3PRL_SPEAKER_CACHE``, else ``~/.cache/s3prl/download``) under s3prl's names. A file that was put by hand into
``<that folder>/<entry name>/`` comes before both.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import urllib.error
import urllib.parse
import zipfile
from pathlib import Path
from time import sleep

from filelock import FileLock

from ..errors import ConfigError, DownloadError
from .downloader import (
    PASSING,
    Answer,
    copy_atomically,
    download,
    http_message,
    is_nowhere,
    is_offline,
    open_url,
    sha256_of,
)
from .registry import REGISTRY, SHIPPED_FOLDER, PublicCheckpoint, lookup

__all__ = ["by_hand_path", "cache_folder", "cached", "hub_cache_folder", "resolve"]

logger = logging.getLogger(__name__)

_HUB = "https://huggingface.co"
_HUB_URL = re.compile(r"https?://[^/]+/([^/]+/[^/]+)/(?:resolve|blob|raw)/([^/]+)/([^?#]+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
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


def hub_cache_folder() -> Path:
    """Hugging Face's cache folder, found as its own library finds it.

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
    if entry.source == "hub":
        return _from_hub(entry, (endpoint or os.environ.get("HF_ENDPOINT") or _HUB).rstrip("/"), refresh, progress)
    target = _url_path(entry.url)
    path = download(
        entry.url, target, sha256=entry.sha256 if entry.source == "url" else None,
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
    by_hand = by_hand_path(entry)
    if entry.name in REGISTRY and by_hand.is_file():
        return _verified(by_hand, entry.sha256, entry)
    if entry.source == "hub":
        path = _hub_snapshot(entry)
        if path is None:
            return None
        # A large file's blob is named by its sha256.
        blob = path.resolve().name
        return _verified(path, entry.sha256 or (blob if _SHA256.fullmatch(blob) else None), entry)
    if entry.source == "manual":
        return None
    path = _url_path(entry.url)
    if not path.is_file():
        return None
    if _is_archive(path):
        return _extracted(path, entry)
    return _verified(path, entry.sha256 or _recorded(path), entry)


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
    hub = _HUB_URL.match(text)
    endpoint_host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or _HUB).hostname
    if hub and parts.hostname in ("huggingface.co", "hf.co", endpoint_host):
        repo, revision, file = (urllib.parse.unquote(group) for group in hub.groups())
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
    found = sha256_of(path, "checking")
    if found != sha256.lower():
        raise DownloadError(
            f"{path}: got a file of {status.st_size:,} bytes with sha256 {found}, expected {sha256} ({entry.title}); "
            "it is damaged or was changed: delete it (or pass refresh=True, command line: fetch --refresh) to fetch it "
            "again, or pass another file with -k PATH"
        )
    try:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        beside = stamp.with_name(f"{stamp.name}.{os.getpid()}.part")
        beside.write_text(json.dumps(now), encoding="utf-8")
        os.replace(beside, stamp)
    except OSError as error:
        logger.debug("%s: not noted as checked: %s", path, error)
    return path


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


# --- files of the Hugging Face Hub -----------------------------------------------------------------------------------


def _hub_repo(entry: PublicCheckpoint) -> Path:
    return hub_cache_folder() / ("models--" + str(entry.repo).replace("/", "--"))


def _hub_snapshot(entry: PublicCheckpoint) -> Path | None:
    repo, revision = _hub_repo(entry), str(entry.revision)
    commit = revision
    if not _COMMIT.fullmatch(revision):
        try:
            commit = (repo / "refs" / revision).read_text(encoding="utf-8").strip()
        except OSError:
            return None
    path = repo / "snapshots" / commit / entry.file
    return path if path.is_file() else None


def _from_hub(entry: PublicCheckpoint, endpoint: str, refresh: bool, progress: bool) -> Path:
    """Download a file of the Hub into its cache: blobs/<hash>, a link in snapshots/<commit>, the commit in refs."""
    remedy = _by_hand(entry)
    repo = _hub_repo(entry)
    file = urllib.parse.quote(entry.file)
    url = f"{endpoint}/{entry.repo}/resolve/{urllib.parse.quote(str(entry.revision), safe='')}/{file}"
    before = _hub_snapshot(entry)
    stamp = before.stat().st_mtime_ns if before else None
    lock = hub_cache_folder() / ".locks" / f"{repo.name}-{hashlib.sha256(url.encode()).hexdigest()[:16]}.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(lock)):
            now = _hub_snapshot(entry)
            if now is not None and (not refresh or now.stat().st_mtime_ns != stamp):
                return now  # another process has just fetched it
            answer = _ask(url, remedy)
            commit = answer.commit or (entry.revision if _COMMIT.fullmatch(str(entry.revision)) else None)
            expected = entry.sha256 or (answer.etag if answer.etag and _SHA256.fullmatch(answer.etag) else None)
            if commit is None:
                # A mirror that does not speak the Hub's protocol: no commit to file it under.
                return download(
                    url, _url_path(url), sha256=expected, progress=progress, refresh=refresh, remedy=remedy,
                    check=_check_is_no_page,
                )  # fmt: skip
            blob = repo / "blobs" / (answer.etag or expected or hashlib.sha256(url.encode()).hexdigest())
            download(
                url, blob, sha256=expected, progress=progress, refresh=refresh, remedy=remedy, check=_check_is_no_page
            )
            # The Hub's own cache has no notes beside its blobs; the blob's name is its checksum.
            for extra in (".sha256", ".lock"):
                blob.with_name(blob.name + extra).unlink(missing_ok=True)
            snapshot = repo / "snapshots" / commit / entry.file
            _link(blob, snapshot)
            if not _COMMIT.fullmatch(str(entry.revision)):
                reference = repo / "refs" / str(entry.revision)
                reference.parent.mkdir(parents=True, exist_ok=True)
                beside = reference.with_name(f"{reference.name}.{os.getpid()}.part")
                beside.write_text(commit, encoding="utf-8")
                os.replace(beside, reference)
            return snapshot
    except OSError as error:
        if isinstance(error, DownloadError):
            raise
        raise DownloadError(f"{url}: cannot be stored in {hub_cache_folder()}: {error}. {remedy}") from error


def _ask(url: str, remedy: str) -> Answer:
    """Commit, hash and size of a file of the Hub, by a HEAD request, tried again a few times as a download is."""
    for attempt in range(4):
        try:
            response, answer = open_url(url, method="HEAD")
            response.close()
            return answer
        except urllib.error.HTTPError as error:
            problem, final = http_message(url, error), error.code not in PASSING
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            problem = f"{url}: cannot be reached: {getattr(error, 'reason', None) or error or type(error).__name__}"
            final = is_nowhere(error) and attempt > 0
        if final or attempt == 3:
            break
        sleep(0.5 * 2**attempt)
    raise DownloadError(f"{problem}. {remedy}")


def _link(blob: Path, snapshot: Path) -> None:
    snapshot.parent.mkdir(parents=True, exist_ok=True)
    beside = snapshot.with_name(f"{snapshot.name}.{os.getpid()}.part")
    beside.unlink(missing_ok=True)
    try:
        os.symlink(os.path.relpath(blob, snapshot.parent), beside)
        os.replace(beside, snapshot)
    except (OSError, NotImplementedError):
        # File systems without links (some network shares, Windows): a copy, as the Hub's own library does.
        beside.unlink(missing_ok=True)
        copy_atomically(blob, snapshot)


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
    """Folder with the checkpoint and its configuration out of a downloaded zip; nothing else is unpacked."""
    folder = archive.with_name(f"{archive.name}.unpacked")
    wanted = {entry.file, "config.yaml", "config.yml", "avg_model.pt", "model_avg.pt", "hyperparams.yaml"}
    with FileLock(f"{archive}.lock"):
        if folder.is_dir():
            # Of many that refresh at once, those behind the first find a folder younger than the archive.
            if not refresh or folder.stat().st_mtime_ns >= archive.stat().st_mtime_ns:
                return folder
            shutil.rmtree(folder)
        beside = Path(tempfile.mkdtemp(prefix=f".{archive.name}.", dir=archive.parent))
        try:
            weights = 0
            with zipfile.ZipFile(archive) as packed:
                for member in packed.infolist():
                    # Only the last part of a member's name is used, so nothing can be written outside the folder.
                    name = Path(member.filename.replace("\\", "/")).name
                    if member.is_dir() or name not in wanted or stat.S_ISLNK(member.external_attr >> 16):
                        continue
                    if member.file_size > _LARGEST_MEMBER:
                        raise DownloadError(f"{archive}: {member.filename} claims {member.file_size:,} bytes; refused")
                    with packed.open(member) as source, open(beside / name, "wb") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
                    weights += not name.endswith((".yaml", ".yml"))
            if not weights:
                names = ", ".join(zipfile.ZipFile(archive).namelist()[:5])
                raise DownloadError(f"{archive}: holds {names}, expected {entry.file}. {_by_hand(entry)}")
            os.replace(beside, folder)
        except zipfile.BadZipFile as error:
            raise DownloadError(f"{archive}: is a damaged zip ({error}); delete it to fetch it again") from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return folder
