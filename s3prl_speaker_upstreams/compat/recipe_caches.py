"""Caches that two recipes write into the installed package: moved to the experiment's folder, keyed by corpus.

SID keeps its path lists as ``voxceleb1/.cache/{train,dev,test}.pkl`` and ASV its trimmed lengths as
``sv_voxceleb1/.wav_lengths/Voxceleb1_length.pt``, both beside s3prl's own modules: a second corpus is then answered
from the first one's cache without a word, and read-only installations cannot run at all. Here the folder is
``EXPDIR/s3prl_cache/{task}/{key}``, where the key is a digest of the corpus.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["cache_folder", "corpus_key", "redirect_lengths", "redirect_path_lists", "remember_expdir"]

_expdir: ContextVar[str | None] = ContextVar("s3prl_expdir", default=None)


def cache_folder(task: str, key: str) -> Path:
    """``EXPDIR/s3prl_cache/task/key``; outside an experiment the same under the user's cache folder."""
    expdir = _expdir.get()
    if expdir is None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "s3prl_speaker_upstreams"
    else:
        base = Path(expdir)
    return base / "s3prl_cache" / task / key


def corpus_key(root: str | os.PathLike, *texts: bytes, files: Iterable[tuple[str, int]] = ()) -> str:
    """16 hexadecimal digits for a corpus: its place as given and resolved, its lists, (name, bytes) of its files."""
    digest = hashlib.sha256()
    for part in (
        str(root).encode(),
        os.path.realpath(root).encode(),
        os.getcwd().encode() * (not os.path.isabs(root)),
        *texts,
    ):
        digest.update(len(part).to_bytes(8, "little") + part)
    for name, size in files:
        digest.update(f"{name}\0{size}\0".encode())
    return digest.hexdigest()[:16]


def _files(root: Path) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    for folder, _, names in os.walk(root):
        found.extend((path := os.path.join(folder, name), os.stat(path).st_size) for name in names)
    return sorted(found)


@contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def _whole_files(folder: Path, *names: str) -> Iterator[Path]:
    """The folder to give to s3prl: `folder` if it has all the files, else one beside it whose files then move in.

    A run that is killed while s3prl writes its cache, or a second process of the same run, never sees half a file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if all((folder / name).is_file() for name in names):
        yield folder
        return
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield beside
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(beside / name, folder / name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def remember_expdir(module: ModuleType) -> None:
    """Let datasets that an expert's constructor makes know the experiment's folder."""
    expert = module.DownstreamExpert
    original = expert.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        token = _expdir.set(kwargs.get("expdir", args[2] if len(args) > 2 else None))
        try:
            original(self, *args, **kwargs)
        finally:
            _expdir.reset(token)

    expert.__init__ = __init__


def redirect_path_lists(module: ModuleType) -> None:
    """s3prl/downstream/voxceleb1/dataset.py: its ``CACHE_PATH`` while one dataset is made."""
    original: Callable[..., None] = module.SpeakerClassifiDataset.__init__

    @functools.wraps(original)
    def __init__(self: Any, mode: str, file_path: Any, meta_data: Any, max_timestep: int | None = None) -> None:
        folder = cache_folder("voxceleb1", corpus_key(file_path, Path(meta_data).read_bytes()))
        with _whole_files(folder, f"{mode}.pkl") as given, _replaced(module, "CACHE_PATH", str(given)):
            original(self, mode, file_path, meta_data, max_timestep)

    module.SpeakerClassifiDataset.__init__ = __init__


def redirect_lengths(module: ModuleType) -> None:
    """s3prl/downstream/sv_voxceleb1/dataset.py: the folder derived from its ``__file__``, while one dataset is made."""
    original: Callable[..., None] = module.SpeakerVerifi_train.__init__

    @functools.wraps(original)
    def __init__(self: Any, vad_config: Any, key_list: Any, file_path: Any, *args: Any, **kwargs: Any) -> None:
        key = corpus_key("", *(corpus_key(root, files=_files(Path(root))).encode() for root in file_path))
        folder = cache_folder("sv_voxceleb1", key)
        names = [f".wav_lengths/{name}_length.pt" for name in key_list]
        with _whole_files(folder, *names) as given, _replaced(module, "__file__", str(given / "dataset.py")):
            original(self, vad_config, key_list, file_path, *args, **kwargs)

    module.SpeakerVerifi_train.__init__ = __init__
