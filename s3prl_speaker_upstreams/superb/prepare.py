"""Files that a task's s3prl code reads beside the corpus: lists, vocabularies, lexica, Kaldi tables.

The PyPI package of s3prl lacks them, and some hold a machine's paths; they are written into a folder of their own,
never into the corpus or the package. Where the user gives a checkout of s3prl (``--s3prl-root``), the lists that it
ships are taken from there, so that splits are the benchmark's to the line.
"""

from __future__ import annotations

import json
import logging
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import soundfile

from s3prl_speaker_upstreams.superb.audio import write_text
from s3prl_speaker_upstreams.superb.errors import CorpusError
from s3prl_speaker_upstreams.superb.tasks import Task

__all__ = ["CHARACTERS", "LETTERS", "PHONES", "prepare"]

logger = logging.getLogger(__name__)

_VOWELS = ("AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW")
_CONSONANTS = (
    *("B", "CH", "D", "DH", "F", "G", "HH", "JH", "K", "L", "M", "N", "NG", "P"),
    *("R", "S", "SH", "T", "TH", "V", "W", "Y", "Z", "ZH"),
)
PHONES = (
    "SIL",
    "SPN",
    *sorted([*_CONSONANTS, *(f"{vowel}{stress}" for vowel in _VOWELS for stress in "012")]),
)
"""PR's classes: silence, spoken noise and the CMU dictionary's phones with lexical stress, in alphabetical order."""

CHARACTERS = (" ", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "'")
"""SF's characters, before its slot tokens."""

LETTERS = "|ETAONIHSRDLUMCWFGYPBVK'XJQZ"
"""ASR's characters, by falling frequency in LibriSpeech; ``|`` ends a word."""

_SUBSET, _SUBSET_SEED = 1000, 7  # dev utterances of SS that the benchmark validates on, and the seed that draws them


def _first(*places: Path | None) -> Path | None:
    return next((place for place in places if place is not None and place.is_file()), None)


def _shipped(s3prl_root: Path | None, *parts: str) -> Path | None:
    return None if s3prl_root is None else s3prl_root.joinpath("s3prl", "downstream", *parts)


def _phonemes(data: Path, out: Path, s3prl_root: Path | None) -> None:
    places = [data / "lexicon", _shipped(s3prl_root, "ctc", "lexicon")]
    lexica = next((found for place in places if place and (found := sorted(place.glob("*.txt")))), None)
    if lexica is None:
        raise CorpusError(
            f"{data}/lexicon: no lexicon (*.txt). PR needs librispeech-lexicon-200k-g2p.txt and "
            "librispeech-lexicon-allothers-g2p.txt, which lie in s3prl's repository in s3prl/downstream/ctc/lexicon: "
            "put them into that folder, or give a checkout with --s3prl-root"
        )
    words: set[str] = set()
    for lexicon in lexica:
        (out / "lexicon").mkdir(parents=True, exist_ok=True)
        lines = lexicon.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            word, *phones = line.split() or [""]
            strange = sorted(set(phones) - set(PHONES))
            if strange or not phones:
                raise CorpusError(f"{lexicon}:{number}: {line!r} is not WORD PHONE PHONE...; unknown {strange}")
            words.add(word)
        write_text(out / "lexicon" / lexicon.name, "\n".join(lines) + "\n")
    _all_words_known(data, words)
    write_text(out / "phoneme.txt", "\n".join(PHONES) + "\n")


def _all_words_known(data: Path, words: set[str]) -> None:
    for split in ("train-clean-100", "dev-clean", "test-clean"):
        for text in sorted((data / split).rglob("*.trans.txt")):
            for line in text.read_text(encoding="utf-8").splitlines():
                absent = [word for word in line.split()[1:] if word not in words]
                if absent:
                    raise CorpusError(f"{text}: word {absent[0]!r} is in no lexicon; PR needs both lexicon files")


def _characters(data: Path, out: Path, s3prl_root: Path | None) -> None:
    # the counts that fairseq's format asks for play no part; the order gives the classes
    write_text(out / "char.dict", "".join(f"{letter} {len(LETTERS) - i}\n" for i, letter in enumerate(LETTERS)))
    for split in ("train-clean-100", "dev-clean", "test-clean"):
        rows = [(soundfile.info(str(file)).frames, file) for file in sorted((data / split).rglob("*.flac"))]
        rows.sort(key=lambda row: row[0], reverse=True)
        table = [",file_path,length,label\n"]
        table += [f"{i},{file.relative_to(data)},{frames},\n" for i, (frames, file) in enumerate(rows)]
        write_text(out / "len_for_bucket" / f"{split}.csv", "".join(table))


def _identification(data: Path, out: Path, s3prl_root: Path | None) -> None:
    source = _first(
        data / "veri_test_class.txt",
        data / "iden_split.txt",
        _shipped(s3prl_root, "voxceleb1", "veri_test_class.txt"),
    )
    if source is None:
        raise CorpusError(
            f"{data}: neither iden_split.txt (from VoxCeleb1's page) nor veri_test_class.txt (from s3prl's repository, "
            "s3prl/downstream/voxceleb1) is there; put one into that folder or give a checkout with --s3prl-root"
        )
    there = {part: set() for part in "123"}
    roots = [data / "dev" / "wav", data / "test" / "wav"]
    for number, line in enumerate(source.read_text().splitlines(), 1):
        fields = line.split()
        if len(fields) != 2 or fields[0] not in there:
            raise CorpusError(f"{source}:{number}: {line!r} is not '1|2|3 id/video/utterance.wav'")
        if not any((root / fields[1]).is_file() for root in roots):
            raise CorpusError(f"{source}:{number}: {fields[1]} is in neither {roots[0]} nor {roots[1]}")
        there[fields[0]].add(fields[1])
    empty = [name for part, name in (("1", "train"), ("2", "dev"), ("3", "test")) if not there[part]]
    if empty:
        raise CorpusError(f"{source}: no utterance of {', '.join(empty)}")
    write_text(out / "veri_test_class.txt", source.read_text())


def _verification(data: Path, out: Path, s3prl_root: Path | None) -> None:
    source = _first(
        data / "voxceleb1_test_v2.txt",
        data / "veri_test2.txt",
        _shipped(s3prl_root, "sv_voxceleb1", "voxceleb1_test_v2.txt"),
    )
    if source is None:
        raise CorpusError(
            f"{data}: neither veri_test2.txt (from VoxCeleb1's page) nor voxceleb1_test_v2.txt (from s3prl's "
            "repository, s3prl/downstream/sv_voxceleb1) is there; put one into that folder or give --s3prl-root"
        )
    labels = set()
    for number, line in enumerate(source.read_text().splitlines(), 1):
        fields = line.split()
        if len(fields) != 3 or fields[0] not in ("0", "1"):
            raise CorpusError(f"{source}:{number}: {line!r} is not '0|1 id/video/a.wav id/video/b.wav'")
        labels.add(fields[0])
        for name in fields[1:]:
            if not (data / "test" / "wav" / name).is_file():
                raise CorpusError(f"{source}:{number}: {name} is not in {data / 'test' / 'wav'}")
    if labels != {"0", "1"}:
        raise CorpusError(f"{source}: holds trials of label {sorted(labels)} only; EER needs both kinds")
    write_text(out / "voxceleb1_test_v2.txt", source.read_text())
    # s3prl opens a dev trial list when it starts but, with eval_dataloaders empty, scores none of it
    dev = _first(data / "dev_meta_data.txt", _shipped(s3prl_root, "sv_voxceleb1", "dev_meta_data", "dev_meta_data.txt"))
    write_text(out / "dev_meta_data.txt", (dev or source).read_text())
    speakers = sorted(folder.name for folder in (data / "dev" / "wav").iterdir() if folder.is_dir())
    write_text(out / "dev_speaker_ids.txt", "".join(f"{name}\n" for name in speakers))


def _emotions(data: Path, out: Path, s3prl_root: Path | None) -> None:
    sessions = [f"Session{number}" for number in range(1, 6)]
    shipped = _shipped(s3prl_root, "emotion", "meta_data")
    if shipped is not None and _first(shipped / "Session1" / "train_meta_data.json"):
        entries = json.loads((shipped / "Session1" / "train_meta_data.json").read_text())["meta_data"]
        if all((data / entry["path"]).is_file() for entry in entries):
            for session in sessions:
                for part in ("train", "test"):
                    name = f"{part}_meta_data.json"
                    write_text(out / "meta_data" / session / name, (shipped / session / name).read_text())
            return
    own = {session: _session(data, session) for session in sessions}
    labels = {"neu": 0, "hap": 1, "ang": 2, "sad": 3}
    for session in sessions:
        train = [entry for other in sessions if other != session for entry in own[other]]
        for part, entries in (("train", train), ("test", own[session])):
            text = json.dumps({"labels": labels, "meta_data": entries})
            write_text(out / "meta_data" / session / f"{part}_meta_data.json", text)


def _session(data: Path, session: str) -> list[dict[str, str]]:
    """Utterances of one session with one of the four emotions; excited counts as happy, as the benchmark does."""
    wavs = {path.stem: path.relative_to(data) for path in sorted((data / session / "sentences/wav").rglob("*.wav"))}
    entries = []
    for file in sorted((data / session / "dialog" / "EmoEvaluation").glob("*.txt")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            fields = [field for field in re.split(r"[\t\n]", line) if field] if line.startswith("[") else []
            if len(fields) > 2 and fields[2] in ("neu", "hap", "ang", "sad", "exc") and fields[1] in wavs:
                emotion = "hap" if fields[2] == "exc" else fields[2]
                path = str(wavs[fields[1]])
                entries.append({"path": path, "label": emotion, "speaker": Path(path).name.split("_")[0]})
    if not entries:
        raise CorpusError(f"{data / session}: no utterance labelled neutral, happy, excited, angry or sad")
    return entries


def _slots(data: Path, out: Path, s3prl_root: Path | None) -> None:
    write_text(out / "character.txt", "".join(f"{character}\n" for character in CHARACTERS))


def _kaldi(out: Path, condition: str, files: dict[str, Path]) -> None:
    write_text(out / condition / "wav.scp", "".join(f"{name} {path}\n" for name, path in sorted(files.items())))
    for table in ("utt2spk", "spk2utt"):
        write_text(out / condition / table, "".join(f"{name} {name}\n" for name in sorted(files)))


def _no_blanks(path: Path) -> None:
    if len(str(path).split()) != 1:
        raise CorpusError(f"{path}: s3prl splits Kaldi tables at blanks, so the path must hold none; use a link to it")


def _enhancement(data: Path, out: Path, s3prl_root: Path | None) -> None:
    _no_blanks(data)
    for condition in ("clean", "noisy"):
        train = {f.stem: f for f in sorted((data / f"{condition}_trainset_28spk_wav_16k").glob("*.wav"))}
        dev = {name: file for name, file in train.items() if name.startswith(("p226", "p287"))}
        _kaldi(out / "train", condition, {name: file for name, file in train.items() if name not in dev})
        _kaldi(out / "dev", condition, dev)
        test = {f.stem: f for f in sorted((data / f"{condition}_testset_wav_16k").glob("*.wav"))}
        _kaldi(out / "test", condition, test)


def _separation(data: Path, out: Path, s3prl_root: Path | None) -> None:
    _no_blanks(data)
    base = data / "wav16k" / "min"
    for part, folder in (("train", "train-100"), ("dev", "dev"), ("test", "test")):
        names = sorted(file.stem for file in (base / folder / "mix_clean").glob("*.wav"))
        if part == "dev" and len(names) > _SUBSET:
            random.Random(_SUBSET_SEED).shuffle(names)
            names = sorted(names[:_SUBSET])
        for condition in ("s1", "s2", "mix_clean"):
            _kaldi(out / part, condition, {name: base / folder / condition / f"{name}.wav" for name in names})


def _nothing(data: Path, out: Path, s3prl_root: Path | None) -> None:
    """The corpus has all that the task reads."""


_WRITERS: dict[str, Callable[[Path, Path, Path | None], None]] = {
    "PR": _phonemes,
    "ASR": _characters,
    "KS": _nothing,
    "QbE": _nothing,
    "SID": _identification,
    "ASV": _verification,
    "SD": _nothing,
    "IC": _nothing,
    "SF": _slots,
    "ER": _emotions,
    "SE": _enhancement,
    "SS": _separation,
}


def prepare(task: Task, data: str | Path, out: str | Path, s3prl_root: str | Path | None = None) -> Path:
    """Write what `task` reads beside its corpus; whole or, after an error, not at all.

    Parameters
    ----------
    task : of :data:`.tasks.TASKS`
    data : root of a corpus that :func:`.checks.check_corpus` accepted
    out : folder for the files
    s3prl_root : a checkout of s3prl, whose shipped lists are preferred; None for the PyPI package

    Raises
    ------
    CorpusError if a list or a lexicon is absent, or does not fit the corpus.
    """
    data, out = Path(data).absolute(), Path(out).absolute()
    beside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    _WRITERS[task.name](data, beside, None if s3prl_root is None else Path(s3prl_root).absolute())
    shutil.rmtree(out, ignore_errors=True)
    beside.rename(out)
    return out
