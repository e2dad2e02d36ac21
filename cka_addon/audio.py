"""Lists of recordings and reading them: mono, float32, 16 kHz; what was changed on the way is recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cka_addon.errors import AudioError

SAMPLE_RATE = 16000
EXTENSIONS = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".au", ".w64", ".sph", ".opus")


@dataclass(frozen=True)
class Recording:
    """One recording. id : unique name, path : file, seconds : length by its header (None where it cannot be read)."""

    id: str
    path: Path
    seconds: float | None = None
    problem: str | None = None


def find_recordings(source: str | Path | Sequence, *, limit: int | None = None) -> list[Recording]:
    """Recordings of a folder, a list file or a Python list, sorted by id, with lengths read from the headers.

    source : a folder (searched through, ids are paths below it without the ending); a text file with one path per line,
        or `id <tab> path`; or a list of paths. Relative paths in a list file are taken from the file's folder.
    limit : keep only the first so many
    Raises AudioError where nothing is found, a listed file is missing or two recordings share an id.
    """
    return [_probe(name, path) for name, path in list_paths(source)[:limit]]


def list_paths(source: str | Path | Sequence) -> list[tuple[str, Path]]:
    """(id, path) of the recordings of `find_recordings`, sorted by id, without opening them."""
    pairs: list[tuple[str, Path]]
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
            pairs = [(p.relative_to(path).with_suffix("").as_posix(), p) for p in files]
            if not pairs:
                raise AudioError(f"{path}: no recording found; expected files ending in {', '.join(EXTENSIONS)}")
        elif path.suffix.lower() in EXTENSIONS and path.is_file():
            pairs = [(path.stem, path)]
        elif path.is_file():
            pairs = _read_list(path)
        else:
            raise AudioError(f"{path}: does not exist; expected a folder of recordings or a list of paths")
    else:
        pairs = [(Path(p).with_suffix("").as_posix(), Path(p)) for p in source]
        if not pairs:
            raise AudioError("got an empty list of recordings; expected at least one path")
    seen: dict[str, Path] = {}
    for name, path in pairs:
        if name in seen:
            raise AudioError(
                f"two recordings are called '{name}': {seen[name]} and {path}; give ids in a list file (id <tab> path)"
            )
        seen[name] = path
    return sorted(pairs)


def _read_list(path: Path) -> list[tuple[str, Path]]:
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, _, file = line.rpartition("\t")
        target = Path(file.strip()).expanduser()
        target = target if target.is_absolute() else path.parent / target
        if not target.is_file():
            raise AudioError(f"{path}:{number}: {target} does not exist; expected the path of a recording")
        pairs.append((name.strip() or Path(file.strip()).with_suffix("").as_posix(), target))
    if not pairs:
        raise AudioError(f"{path}: holds no path; expected one recording per line")
    return pairs


def _probe(name: str, path: Path) -> Recording:
    import soundfile

    try:
        info = soundfile.info(str(path))
    except (RuntimeError, OSError) as error:
        return Recording(name, path, problem=f"{type(error).__name__}: {error}")
    if info.frames <= 0:
        return Recording(name, path, problem="the file holds no samples")
    return Recording(name, path, info.frames / info.samplerate)


def load(recording: Recording) -> tuple[torch.Tensor, dict[str, object]]:
    """Samples of one recording and what was done to them.

    Returns (samples,) float32 at 16 kHz in +-1 and {"seconds", "sample_rate", "channels", "resampled"}. Other rates are
    resampled by soxr (HQ), channels are averaged. Raises AudioError where the file cannot be read or is empty.
    """
    import soundfile

    if recording.problem:
        raise AudioError(f"{recording.path}: {recording.problem}")
    try:
        samples, rate = soundfile.read(str(recording.path), dtype="float32", always_2d=True)
    except (RuntimeError, OSError) as error:
        raise AudioError(
            f"{recording.path}: cannot be read ({error}); expected an audio file soundfile can open"
        ) from error
    channels = samples.shape[1]
    mono = samples[:, 0] if channels == 1 else samples.mean(axis=1)
    if rate != SAMPLE_RATE:
        import soxr

        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    if mono.size == 0:
        raise AudioError(f"{recording.path}: holds no samples; expected speech")
    if not np.isfinite(mono).all():
        raise AudioError(f"{recording.path}: holds NaN or infinite samples; expected finite ones")
    done = {
        "seconds": mono.size / SAMPLE_RATE,
        "sample_rate": rate,
        "channels": channels,
        "resampled": rate != SAMPLE_RATE,
    }
    return torch.from_numpy(np.ascontiguousarray(mono, dtype=np.float32)), done
