"""Files that appear whole or not at all, and locks that keep two processes out of each other's way."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from s3prl_speaker_upstreams.errors import Busy

__all__ = ["append_line", "locked", "write_json", "write_text", "write_whole"]


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object], *, durable: bool = False) -> Path:
    """Call ``write`` with a temporary path beside ``path``, then rename: ``path`` appears whole or not at all.

    Parameters
    ----------
    path : its folder is made if need be; an existing file is replaced
    write : gets a path with the same ending (writers such as ``savefig`` read the format from it) and writes there
    durable : also wait until the bytes are on the disk, so that a power cut leaves the old file or the new one

    Returns
    -------
    ``path``. Whatever ``write`` raises goes through; the temporary file is removed and an existing ``path`` kept.

    >>> folder = Path(tempfile.mkdtemp())
    >>> write_whole(folder / "a.txt", lambda beside: beside.write_text("whole")).read_text()
    'whole'
    >>> write_whole(folder / "a.txt", lambda beside: 1 / 0)
    Traceback (most recent call last):
    ...
    ZeroDivisionError: division by zero
    >>> [p.name for p in folder.iterdir()], (folder / "a.txt").read_text()
    (['a.txt'], 'whole')
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:100]}.", suffix=path.suffix)
    os.close(handle)
    beside = Path(name)
    try:
        write(beside)
        with contextlib.suppress(PermissionError):  # network file systems may not let their files' modes be changed
            beside.chmod(0o666 & ~_umask())  # mkstemp's are private, an ordinary file's are not
        if durable:
            with open(beside, "rb") as file:
                os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return path


def _umask() -> int:
    mask = os.umask(0o022)  # it can only be read by setting it
    os.umask(mask)
    return mask


def write_text(path: str | os.PathLike[str], text: str, *, durable: bool = False) -> Path:
    """Write ``text`` as UTF-8 with plain line ends, whole or not at all; names that are not Unicode pass through.

    >>> write_text(Path(tempfile.mkdtemp()) / "below" / "a.txt", "line\\n").read_bytes()
    b'line\\n'
    """
    content = text.encode("utf-8", errors="surrogateescape")
    return write_whole(path, lambda beside: beside.write_bytes(content), durable=durable)


def write_json(path: str | os.PathLike[str], data: Any, *, durable: bool = False) -> Path:
    """Write JSON, whole or not at all; NaN and infinity are refused (ValueError), since JSON has neither.

    >>> json.loads(write_json(Path(tempfile.mkdtemp()) / "a.json", {"eer": 0.5}).read_text())
    {'eer': 0.5}
    """
    return write_text(path, json.dumps(data, indent=1, allow_nan=False, default=str) + "\n", durable=durable)


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Add one line to a log in a single write, so that a kill cannot leave two lines run together.

    >>> log = Path(tempfile.mkdtemp()) / "log"
    >>> append_line(log, "a"); append_line(log, "b"); log.read_text()
    'a\\nb\\n'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        file.write(f"{line}\n".encode())


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], what: str, *, timeout: float = 0.0) -> Iterator[None]:
    """Hold the lock file ``path`` while the block runs; the system releases it however the process ends.

    Parameters
    ----------
    path : the lock file; it stays when the lock is gone
    what : what it guards, for the message
    timeout : seconds to wait for another holder; negative: for ever

    Raises Busy if another process still holds it then.

    >>> place = Path(tempfile.mkdtemp()) / "run.lock"
    >>> with locked(place, "the run"):
    ...     with locked(place, "the run"):
    ...         pass
    Traceback (most recent call last):
    ...
    s3prl_speaker_upstreams.errors.Busy: the run is in use by another process (lock ...run.lock); wait for it, ...
    """
    import filelock

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(str(path))
    try:
        lock.acquire(timeout=timeout)
    except filelock.Timeout:
        raise Busy(
            f"{what} is in use by another process (lock {path}); wait for it, stop it, or use another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()
