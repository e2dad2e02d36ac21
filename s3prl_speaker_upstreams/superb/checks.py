"""Look at a corpus before hours are spent on it: layout, splits, counts, sample rates, damaged files."""

from __future__ import annotations

import json
import logging
import os
import re
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import soundfile
from tqdm import tqdm

from s3prl_speaker_upstreams.superb.errors import CorpusError
from s3prl_speaker_upstreams.superb.tasks import Task

__all__ = ["CorpusReport", "audio_problem", "check_corpus"]

logger = logging.getLogger(__name__)

_SHOWN = 5  # problems named in an error; the rest is counted
_RATE = 16000


@dataclass(frozen=True)
class CorpusReport:
    """What was found: utterances of each split, seconds of audio, and how the counts compare to the full corpus."""

    task: str
    root: Path
    counts: dict[str, int]
    seconds: float
    remarks: tuple[str, ...] = ()


def _cut_wav(path: Path) -> str:
    """Why a RIFF file ends before its header says, or ""; libsndfile shortens such files without a word."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(12)
        if len(head) < 12 or head[:4] != b"RIFF":
            return ""  # not RIFF: whatever it is, soundfile judges it
        while True:
            chunk = file.read(8)
            if len(chunk) < 8:
                return "has no audio data chunk"
            name, length = chunk[:4], struct.unpack("<I", chunk[4:])[0]
            if name == b"data":
                there = size - file.tell()
                # 0 and 0xFFFFFFFF are what programs write that stream to a pipe: length unknown
                if length not in (0, 0xFFFFFFFF) and there < length:
                    return f"is cut short: its header promises {length} bytes of audio, {there} are there"
                return ""
            file.seek(length + length % 2, os.SEEK_CUR)


def audio_problem(path: Path, rate: int | None = _RATE) -> tuple[str, float]:
    """(what is wrong with one recording or "", its seconds).

    Finds missing, unreadable, empty and truncated files and, unless `rate` is None, other sample rates (Hz).

    Examples
    --------
    >>> audio_problem(Path("/nowhere.wav"))[0]
    'is not there'
    """
    if not path.is_file():
        return "is not there", 0.0
    try:
        info = soundfile.info(str(path))
        if info.frames == 0:
            return "holds no samples", 0.0
        seconds = info.frames / info.samplerate
        if rate is not None and info.samplerate != rate:
            return f"has a sample rate of {info.samplerate} Hz, expected {rate} Hz", seconds
        if info.format in ("WAV", "WAVEX"):
            return _cut_wav(path), seconds
        with soundfile.SoundFile(str(path)) as file:  # compressed: its last frames must decode
            file.seek(max(0, info.frames - 16))
            wanted = min(16, info.frames)
            got = len(file.read(wanted))
        if got != wanted:
            return "is cut short: its last frames cannot be decoded", seconds
    except (RuntimeError, OSError) as error:
        return f"cannot be read ({error})", 0.0
    return "", seconds


def _need(root: Path, *names: str) -> None:
    absent = [name for name in names if not (root / name).exists()]
    if absent:
        there = sorted(path.name for path in root.iterdir())[:8]
        raise CorpusError(f"{root}: no {', '.join(absent)} in it; it holds {', '.join(there) or 'nothing'}")


def _audio(folder: Path, *suffixes: str) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    if not found:
        raise CorpusError(f"{folder}: no {' or '.join(suffixes)} file in it or below")
    return found


def _librispeech(root: Path) -> dict[str, list[Path]]:
    splits = ("train-clean-100", "dev-clean", "test-clean")
    _need(root, *splits)
    found = {split: _audio(root / split, ".flac") for split in splits}
    for split, files in found.items():
        for folder in sorted({file.parent for file in files}):
            text = folder / f"{folder.parent.name}-{folder.name}.trans.txt"
            if not text.is_file():
                raise CorpusError(f"{text}: the transcripts of {split} are not there; extract the corpus again")
            known = {line.split(" ", 1)[0] for line in text.read_text(encoding="utf-8").splitlines()}
            missing = sorted({file.stem for file in files if file.parent == folder} - known)
            if missing:
                raise CorpusError(f"{text}: no transcript of {missing[0]} ({len(missing)} such); extract it again")
    return found


def _keyword_spotting(root: Path) -> dict[str, list[Path]]:
    _need(root, "train", "test", "train/_background_noise_")
    train = [path for path in _audio(root / "train", ".wav") if path.parent.name != "_background_noise_"]
    noise = _audio(root / "train" / "_background_noise_", ".wav")
    return {"train": train, "test": _audio(root / "test", ".wav"), "background": noise}


def _speaker(root: Path) -> dict[str, list[Path]]:
    _need(root, "dev/wav", "test/wav")
    found = {part: _audio(root / part / "wav", ".wav") for part in ("dev", "test")}
    strange = sorted({path.parts[-3] for paths in found.values() for path in paths} - _voxceleb_ids())
    if strange:
        raise CorpusError(
            f"{root}: speaker folder {strange[0]!r} ({len(strange)} such); expected id10001 to id11251, as VoxCeleb1 "
            "names them: dev/wav/id10001/VIDEO/00001.wav"
        )
    return found


def _voxceleb_ids() -> set[str]:
    return {f"id{number}" for number in range(10001, 11252)}


def _fluent(root: Path) -> dict[str, list[Path]]:
    _need(root, "data", "wavs", *(f"data/{split}_data.csv" for split in ("train", "valid", "test")))
    import pandas  # late: half a second

    found, known = {}, {}
    for split in ("train", "valid", "test"):
        table = pandas.read_csv(root / "data" / f"{split}_data.csv")
        absent = {"path", "action", "object", "location"} - set(table.columns)
        if absent:
            raise CorpusError(f"{root}/data/{split}_data.csv: no column {', '.join(sorted(absent))}")
        found[split] = [root / path for path in table["path"]]
        for slot in ("action", "object", "location"):
            values = set(table[slot])
            if split == "train":
                known[slot] = values
            elif values - known[slot]:
                raise CorpusError(
                    f"{root}/data/{split}_data.csv: {slot} {sorted(values - known[slot])[0]!r} is not in train_data.csv"
                )
    return found


def _iemocap(root: Path) -> dict[str, list[Path]]:
    sessions = [f"Session{number}" for number in range(1, 6)]
    _need(root, *sessions, *(f"{name}/dialog/EmoEvaluation" for name in sessions))
    return {name: _audio(root / name / "sentences" / "wav", ".wav") for name in sessions}


def _diarization(root: Path) -> dict[str, list[Path]]:
    found = {}
    for part in ("train", "dev", "test"):
        files = ["wav.scp", "segments", "utt2spk", "spk2utt", "reco2dur"] + (["rttm"] if part == "test" else [])
        _need(root, part)
        _need(root / part, *files)
        pairs = [line.split(None, 1) for line in (root / part / "wav.scp").read_text().splitlines() if line.strip()]
        segmented = {line.split()[1] for line in (root / part / "segments").read_text().splitlines() if line.strip()}
        bare = sorted({name for name, _ in pairs} - segmented)
        if bare:
            raise CorpusError(f"{root / part}/segments: no line for recording {bare[0]} ({len(bare)} such)")
        # a command ending in "|" is Kaldi's way to convert on the fly; it cannot be looked at
        found[part] = [Path(where.strip()) for _, where in pairs if not where.strip().endswith("|")]
    return found


def _snips(root: Path) -> dict[str, list[Path]]:
    _need(root, "train", "valid", "test", "all.iob.snips.txt", "slots.txt")
    found = {split: _audio(root / split, ".wav") for split in ("train", "valid", "test")}
    known = {line.split(" ", 1)[0] for line in (root / "all.iob.snips.txt").read_text(encoding="utf-8").splitlines()}
    for split, files in found.items():
        if not known & {file.stem for file in files}:
            raise CorpusError(f"{root}/all.iob.snips.txt: no line for any recording of {split}, first {files[0].stem}")
    return found


def _quesst(root: Path) -> dict[str, list[Path]]:
    lists = {part: f"scoring/language_key_{part}.lst" for part in ("utterances", "dev", "eval")}
    truths = [f"scoring/groundtruth_quesst14_{part}" for part in ("dev", "eval")]
    _need(root, "scoring", *lists.values(), *truths)
    found = {}
    for part, file in lists.items():
        rows = [line.split() for line in (root / file).read_text().splitlines() if line.strip()]
        english = [row[0] for row in rows if len(row) == 2 and row[1] == "nnenglish"]
        if not english:
            raise CorpusError(f"{root / file}: no line marked nnenglish, which the task is restricted to")
        found[part] = [root / re.sub(r"^.*?/", "", name) for name in english]
    return found


def _voicebank(root: Path) -> dict[str, list[Path]]:
    folders = [f"{kind}_{part}_wav_16k" for part in ("trainset_28spk", "testset") for kind in ("clean", "noisy")]
    _need(root, *folders)
    found = {folder: _audio(root / folder, ".wav") for folder in folders}
    for part in ("trainset_28spk", "testset"):
        clean, noisy = ({file.name for file in found[f"{kind}_{part}_wav_16k"]} for kind in ("clean", "noisy"))
        if clean != noisy:
            odd = sorted(clean ^ noisy)[0]
            raise CorpusError(f"{root}: {odd} of {part} is there only {'clean' if odd in clean else 'noisy'}")
    if not any(file.name.startswith(("p226", "p287")) for file in found["clean_trainset_28spk_wav_16k"]):
        raise CorpusError(f"{root}: no recording of p226 or p287, the speakers that make up the dev part")
    return found


def _libri2mix(root: Path) -> dict[str, list[Path]]:
    base = root / "wav16k" / "min"
    _need(root, "wav16k/min")
    found = {}
    for part in ("train-100", "dev", "test"):
        _need(base, part)
        _need(base / part, "s1", "s2", "mix_clean")
        names = {kind: {file.name for file in _audio(base / part / kind, ".wav")} for kind in ("s1", "s2", "mix_clean")}
        odd = sorted((names["s1"] | names["s2"]) ^ names["mix_clean"])
        if odd:
            raise CorpusError(f"{base / part}: {odd[0]} is not in all of s1, s2 and mix_clean")
        found[part] = [base / part / kind / name for kind in names for name in sorted(names[kind])]
    return found


_LAYOUTS: dict[str, Callable[[Path], dict[str, list[Path]]]] = {
    "PR": _librispeech,
    "ASR": _librispeech,
    "KS": _keyword_spotting,
    "QbE": _quesst,
    "SID": _speaker,
    "ASV": _speaker,
    "SD": _diarization,
    "IC": _fluent,
    "SF": _snips,
    "ER": _iemocap,
    "SE": _voicebank,
    "SS": _libri2mix,
}

# s3prl resamples these itself (sox effects, Resample, librosa), so any rate is right; the others are read as they are
_ANY_RATE = frozenset({"KS", "QbE", "ASV", "ER", "SE", "SS"})


def check_corpus(task: Task, root: str | os.PathLike[str], *, jobs: int = 8) -> CorpusReport:
    """Check the corpus of one task.

    Parameters
    ----------
    task : of :data:`.tasks.TASKS`
    root : its folder
    jobs : threads that look at recordings (headers and ends, not the whole of each file)

    Returns
    -------
    CorpusReport

    Raises
    ------
    CorpusError that names what is missing or damaged and what to download; at most five files are named.

    Examples
    --------
    >>> import tempfile
    >>> from s3prl_speaker_upstreams.superb.corpora import generate
    >>> from s3prl_speaker_upstreams.superb.tasks import TASKS
    >>> check_corpus(TASKS["SD"], generate("SD", tempfile.mkdtemp(), scale=2)).counts
    {'train': 4, 'dev': 2, 'test': 2}
    """
    root = Path(root).absolute()
    get_it = f"{task.name} needs {task.corpus}"
    if not root.is_dir():
        raise CorpusError(f"{root}: no such folder. {get_it}")
    if not os.access(root, os.R_OK | os.X_OK):
        raise CorpusError(f"{root}: may not be read; change its permissions")
    try:
        found = _LAYOUTS[task.name](root)
    except CorpusError as error:
        raise CorpusError(f"{error}. {get_it}") from error
    rate = None if task.name in _ANY_RATE else _RATE
    files = [path for paths in found.values() for path in paths]
    with ThreadPoolExecutor(jobs) as pool:
        looked = pool.map(lambda path: audio_problem(path, rate), files)
        results = list(tqdm(looked, total=len(files), desc=f"checking {task.name}", disable=len(files) < 2000))
    bad = [f"{path} {problem}" for path, (problem, _) in zip(files, results, strict=True) if problem]
    if bad:
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise CorpusError(
            f"{len(bad)} of {len(files)} recordings of {task.name} cannot be used: {'; '.join(bad[:_SHOWN])}{more}. "
            "Extract those again, or convert them to 16 kHz: sox in.wav -r 16000 out.wav"
        )
    remarks = [
        f"{split}: {len(found[split])} utterances, the full corpus has {count}"
        for split, count in task.counts.items()
        if split in found and len(found[split]) != count
    ]
    report = CorpusReport(
        task.name,
        root,
        {split: len(paths) for split, paths in found.items()},
        sum(seconds for _, seconds in results),
        tuple(remarks),
    )
    logger.info(
        "%s: %s at %s, %.2f hours%s",
        task.name,
        json.dumps(report.counts),
        root,
        report.seconds / 3600,
        "".join(f"\n  note: {remark}" for remark in remarks),
    )
    return report
