"""Small corpora in the exact on-disk layout of each SUPERB task: generated voices, or real speech laid out.

They exist so that whole recipes can be tried, tested and compared between package stacks in minutes, without the
corpora that need a form or 100 GB. Scores on them say nothing about an upstream's worth.

From the shell: ``python -m s3prl_speaker_upstreams.demo.corpora --task KS --out data/KS``, with ``--voices espeak``
for synthetic speech or ``--speech FOLDER`` for real recordings (KS, IC, SF, SID, ASV; the folder as described by
``layout of --speech`` in ``--help``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from s3prl_speaker_upstreams.common.audio import SAMPLE_RATE, find_audio, write_audio
from s3prl_speaker_upstreams.common.commands import run_command
from s3prl_speaker_upstreams.common.files import locked, write_text
from s3prl_speaker_upstreams.demo.voices import KINDS, Voices
from s3prl_speaker_upstreams.demo.voxceleb import lay_out_voxceleb1, read_clip
from s3prl_speaker_upstreams.superb.errors import CorpusError, UnknownTask

__all__ = ["GENERATORS", "SPEECH", "WORDS", "generate", "lay_out_speech", "once"]

logger = logging.getLogger(__name__)

WORDS: dict[str, str] = {
    "THE": "DH AH0",
    "CAT": "K AE1 T",
    "DOG": "D AO1 G",
    "SEES": "S IY1 Z",
    "A": "AH0",
    "RED": "R EH1 D",
    "BLUE": "B L UW1",
    "BOAT": "B OW1 T",
    "GOES": "G OW1 Z",
    "HOME": "HH OW1 M",
    "NOW": "N AW1",
    "WE": "W IY1",
    "LIKE": "L AY1 K",
    "MUSIC": "M Y UW1 Z IH0 K",
    "TIME": "T AY1 M",
    "VERY": "V EH1 R IY0",
}
"""Words of the generated sentences and their ARPAbet pronunciations, which go into the generated lexicon."""

_KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
_INTENTS = (
    ("turn on the lights in the kitchen", "activate", "lights", "kitchen"),
    ("turn off the lights in the bedroom", "deactivate", "lights", "bedroom"),
    ("make it warmer", "increase", "heat", "none"),
    ("play the music", "activate", "music", "none"),
)
_SLOT_SENTENCES = (
    (("PLAY", "O"), ("BLUE", "track"), ("BOAT", "track"), ("BY", "O"), ("THE", "artist"), ("CATS", "artist")),
    (("WEATHER", "O"), ("IN", "O"), ("PARIS", "city"), ("NOW", "timerange")),
    (("PLAY", "O"), ("MUSIC", "O"), ("BY", "O"), ("QUEEN", "artist")),
    (("RAIN", "O"), ("IN", "O"), ("NEW", "city"), ("YORK", "city"), ("TODAY", "timerange")),
)
_SNIPS_SPEAKERS = {"train": ("Ivy", "Joey", "Salli"), "valid": ("Aditi", "Amy"), "test": ("Brian", "Emma")}
_EMOTIONS = {"neu": 0.0, "hap": 0.9, "ang": 0.5, "sad": -0.9}


def _hash_split(file_name: str) -> str:
    """The split that Speech Commands gives a recording by the hash of its speaker (the corpus' README)."""
    limit = 2**27 - 1
    speaker = re.sub(r"_nohash_.*$", "", file_name)
    share = (int(hashlib.sha1(speaker.encode()).hexdigest(), 16) % (limit + 1)) * (100.0 / limit)
    return "valid" if share < 10 else "test" if share < 20 else "train"


def _hash_names(split: str, count: int) -> list[str]:
    """`count` speaker names that Speech Commands' hash puts into `split`."""
    names: list[str] = []
    index = 0
    while len(names) < count:
        name = f"{hashlib.sha1(str(index).encode()).hexdigest()[:8]}"
        if _hash_split(f"{name}_nohash_0.wav") == split:
            names.append(name)
        index += 1
    return names


def _one_second(clip: np.ndarray) -> np.ndarray:
    return np.pad(clip, (0, max(0, SAMPLE_RATE - len(clip))))[:SAMPLE_RATE]


def _background(out: Path, noise: np.random.Generator) -> None:
    for index in range(2):
        colour = np.convolve(noise.standard_normal(2 * SAMPLE_RATE), np.ones(1 + 4 * index) / (1 + 4 * index), "same")
        write_audio(out / "train" / "_background_noise_" / f"noise_{index}.wav", 0.05 * colour)


def _keyword_spotting(out: Path, voices: Voices, scale: int, seed: int) -> None:
    noise = np.random.default_rng(seed)
    for word in (*_KEYWORDS, "bed", "cat"):
        for split, count in (("train", 2 * scale), ("valid", 1)):
            for speaker, name in enumerate(_hash_names(split, count)):
                clip = _one_second(voices.say(word, speaker + (100 if split == "valid" else 0)))
                write_audio(out / "train" / word / f"{name}_nohash_0.wav", clip)
    for word in _KEYWORDS:
        write_audio(out / "test" / word / "0a1b2c3d_nohash_0.wav", _one_second(voices.say(word, 50)))
    write_audio(out / "test" / "_unknown_" / "0a1b2c3d_nohash_1.wav", _one_second(voices.say("bed", 50)))
    write_audio(out / "test" / "_silence_" / "0a1b2c3d_nohash_2.wav", 0.02 * noise.standard_normal(SAMPLE_RATE))
    _background(out, noise)


def _sentence(draw: random.Random, words: int) -> list[str]:
    return [draw.choice(list(WORDS)) for _ in range(words)]


def _voxceleb(out: Path, voices: Voices, scale: int, seed: int) -> None:
    draw = random.Random(seed)
    people = {}
    for speaker in range(4):
        sentences = [" ".join(_sentence(draw, 12)) for _ in range(3 * scale)]
        people[f"speaker_{speaker}"] = [_at_least(voices, text, speaker, 2.6) for text in sentences]
    lay_out_voxceleb1(people, out, test_speakers=["speaker_2", "speaker_3"], trials_per_speaker=3, seed=seed)


def _at_least(voices: Voices, text: str, speaker: int, seconds: float) -> np.ndarray:
    clip = voices.say(text, speaker)
    while len(clip) < seconds * SAMPLE_RATE:
        clip = np.concatenate([clip, voices.say(text, speaker)])
    return clip


def _librispeech(out: Path, voices: Voices, scale: int, seed: int) -> None:
    draw = random.Random(seed)
    for part, (split, count) in enumerate((("train-clean-100", 4 * scale), ("dev-clean", 2), ("test-clean", 2))):
        speaker, chapter, lines = 1000 + part, 100 + part, []
        for index in range(count):
            words = _sentence(draw, 3 + index % 3)
            name = f"{speaker}-{chapter}-{index:04d}"
            write_audio(out / split / str(speaker) / str(chapter) / f"{name}.flac", voices.say(" ".join(words), part))
            lines.append(f"{name} {' '.join(words)}\n")
        write_text(out / split / str(speaker) / str(chapter) / f"{speaker}-{chapter}.trans.txt", "".join(lines))
    write_text(out / "lexicon" / "smoke-lexicon.txt", "".join(f"{word}\t{phones}\n" for word, phones in WORDS.items()))


def _fluent_commands(out: Path, voices: Voices, scale: int, seed: int) -> None:
    rows: dict[str, list[tuple[str, ...]]] = {}
    for split, speakers in (("train", range(scale)), ("valid", (40,)), ("test", (41,))):
        for speaker in speakers:
            for index, (text, action, thing, place) in enumerate(_INTENTS):
                path = f"wavs/speakers/spk{speaker:02d}/{split}_{index}.wav"
                write_audio(out / path, voices.say(text, speaker))
                rows.setdefault(split, []).append((path, f"spk{speaker:02d}", text, action, thing, place))
    _write_fluent_csv(out, rows)


def _write_fluent_csv(out: Path, rows: dict[str, list[tuple[str, ...]]]) -> None:
    for split, entries in rows.items():
        lines = [",path,speakerId,transcription,action,object,location\n"]
        lines += [f"{index},{','.join(entry)}\n" for index, entry in enumerate(entries)]
        write_text(out / "data" / f"{split}_data.csv", "".join(lines))


def _iemocap(out: Path, voices: Voices, scale: int, seed: int) -> None:
    texts = ("we like the music", "the cat goes home", "a red boat")
    for session in range(1, 6):
        for dialog in range(max(1, scale // 2)):
            name, lines = (
                f"Ses0{session}F_impro0{dialog + 1}",
                ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"],
            )
            for index, (emotion, mood) in enumerate(_EMOTIONS.items()):
                utterance = f"{name}_F{index:03d}"
                clip = voices.say(texts[(session + index) % 3], session, mood=mood)
                write_audio(out / f"Session{session}/sentences/wav/{name}/{utterance}.wav", clip)
                seconds = len(clip) / SAMPLE_RATE
                lines.append(
                    f"[{index:.4f} - {index + seconds:.4f}]\t{utterance}\t{emotion}\t[2.5000, 2.5000, 2.5000]\n"
                )
            write_text(out / f"Session{session}/dialog/EmoEvaluation/{name}.txt", "".join(lines))


def _diarization(out: Path, voices: Voices, scale: int, seed: int) -> None:
    draw = random.Random(seed)
    for part, count in (("train", 2 * scale), ("dev", 2), ("test", 2)):
        recordings = {}
        for index in range(count):
            pair = (draw.randrange(0, 10), draw.randrange(10, 20))
            first, second = (_at_least(voices, " ".join(_sentence(draw, 6)), who, 2.2) for who in pair)
            start = int(len(first) * draw.uniform(0.5, 0.9))
            total = max(len(first), start + len(second))
            mixture = np.zeros(total, np.float32)
            mixture[: len(first)] += first
            mixture[start : start + len(second)] += second
            spans = ((f"{pair[0]:04d}", 0.0, len(first)), (f"{pair[1]:04d}", start, start + len(second)))
            recordings[f"{part}{index:03d}"] = (0.7 * mixture, spans)
        _write_kaldi_diarization(out / part, recordings)


def _write_kaldi_diarization(folder: Path, recordings: dict) -> None:
    """wav.scp, segments, utt2spk, spk2utt, reco2dur and rttm of mixtures with their speakers' (start, end) samples."""
    scp, segments, utt2spk, reco2dur, rttm = [], [], [], [], []
    spk2utt: dict[str, list[str]] = {}
    for name, (samples, spans) in recordings.items():
        wav = write_audio(folder / "wav" / f"{name}.wav", samples)
        scp.append(f"{name} {wav.absolute()}\n")
        reco2dur.append(f"{name} {len(samples) / SAMPLE_RATE:.4f}\n")
        for speaker, start, end in spans:
            begin, stop = start / SAMPLE_RATE, end / SAMPLE_RATE
            utterance = f"{speaker}_{name}_{round(begin * 100):07d}_{round(stop * 100):07d}"
            segments.append(f"{utterance} {name} {begin:.2f} {stop:.2f}\n")
            utt2spk.append(f"{utterance} {speaker}\n")
            spk2utt.setdefault(speaker, []).append(utterance)
            rttm.append(f"SPEAKER {name} 1 {begin:7.2f} {stop - begin:7.2f} <NA> <NA> {speaker} <NA>\n")
    parts = {"wav.scp": scp, "segments": segments, "utt2spk": utt2spk, "reco2dur": reco2dur, "rttm": rttm}
    parts["spk2utt"] = [f"{speaker} {' '.join(own)}\n" for speaker, own in sorted(spk2utt.items())]
    for file, lines in parts.items():
        write_text(folder / file, "".join(lines))


def _snips(out: Path, voices: Voices, scale: int, seed: int) -> None:
    entries = []
    for split, speakers in _SNIPS_SPEAKERS.items():
        for number, speaker in enumerate(speakers[: max(1, scale)]):
            for index, sentence in enumerate(_SLOT_SENTENCES):
                name = f"{speaker}-snips-{split}-{index}"
                text = " ".join(word for word, _ in sentence)
                write_audio(out / split / f"{name}.wav", voices.say(text, number + 10 * len(split)))
                entries.append((name, sentence))
    _write_snips_text(out, entries)


def _write_snips_text(out: Path, entries: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> None:
    """``all.iob.snips.txt`` (name, BOS words EOS, tab, O slots intent), ``all-trans.txt`` and ``slots.txt``."""
    lines, plain = [], []
    slots: set[str] = set()
    for name, sentence in entries:
        words, tags = " ".join(w for w, _ in sentence), " ".join(t for _, t in sentence)
        slots.update(tag for _, tag in sentence if tag != "O")
        lines.append(f"{name} BOS {words} EOS\tO {tags} intent\n")
        plain.append(f"{name} {words}\n")
    write_text(out / "all.iob.snips.txt", "".join(lines))
    write_text(out / "all-trans.txt", "".join(plain))
    write_text(out / "slots.txt", "\n".join(["O", *sorted(slots)]))  # s3prl skips the first line


def _quesst(out: Path, voices: Voices, scale: int, seed: int) -> None:
    draw = random.Random(seed)
    words = ("music", "home", "boat", "very", "time", "goes")
    documents = {}
    for index in range(3 * scale):
        inside = draw.sample(words, 2)
        documents[f"quesst14_{index + 1:05d}"] = inside
        write_audio(out / "Audio" / f"quesst14_{index + 1:05d}.wav", voices.say(" ".join(inside), index), 16000)
    write_list = {"utterances": [f"quesst14Database/Audio/{name}.wav nnenglish\n" for name in documents]}
    # one document of another language, which s3prl must skip
    write_audio(out / "Audio" / "quesst14_99999.wav", voices.say("zzz", 9))
    write_list["utterances"].append("quesst14Database/Audio/quesst14_99999.wav albanian\n")
    for part, first, said in (("dev", 0, words[:3]), ("eval", 30, words[3:])):
        lines, truth = [], []
        for index, word in enumerate(said):
            query = f"quesst14_{part}_{index + 1:04d}"
            write_audio(out / f"{part}_queries" / f"{query}.wav", voices.say(word, first + index))
            lines.append(f"quesst14Database/{part}_queries/{query}.wav nnenglish\n")
            truth += [
                f"LEXEME {name} 1 0.00 1.00 {query} lex <NA> 0.5\n" for name, own in documents.items() if word in own
            ]
        write_list[part] = lines
        folder = out / "scoring" / f"groundtruth_quesst14_{part}"
        write_text(folder / f"quesst14_{part}.rttm", "".join(truth))
        files = "".join(f'<excerpt audio_filename="{n}" channel="1" tbeg="0" dur="1"/>\n' for n in documents)
        write_text(folder / "quesst14.ecf.xml", f'<ecf source_signal_duration="1" language="mul">\n{files}</ecf>\n')
        terms = "".join(f'<term termid="quesst14_{part}_{i + 1:04d}"/>\n' for i in range(len(said)))
        write_text(folder / f"quesst14_{part}.tlist.xml", f"<termlist>\n{terms}</termlist>\n")
    for name, lines in write_list.items():
        write_text(out / "scoring" / f"language_key_{name}.lst", "".join(lines))


def _voicebank(out: Path, voices: Voices, scale: int, seed: int) -> None:
    draw, noise = random.Random(seed), np.random.default_rng(seed)
    train = [("p228", index) for index in range(2 * scale)]
    parts = {"trainset_28spk": [*train, ("p226", 0), ("p287", 0)], "testset": [("p232", 0), ("p257", 1)]}
    for part, names in parts.items():
        for speaker, index in names:
            # PESQ of SE's dev evaluation wants some seconds with speech in them
            clean = _at_least(voices, " ".join(_sentence(draw, 6)), int(speaker[1:]), 1.5)
            noisy = clean + 0.05 * noise.standard_normal(len(clean)).astype(np.float32)
            for kind, samples in (("clean", clean), ("noisy", noisy)):
                write_audio(out / f"{kind}_{part}_wav_16k" / f"{speaker}_{index + 1:03d}.wav", samples)


def _libri2mix(out: Path, voices: Voices, scale: int, seed: int) -> None:
    draw = random.Random(seed)
    for part, count in (("train-100", 2 * scale), ("dev", 2), ("test", 2)):
        for index in range(count):
            both = [_at_least(voices, " ".join(_sentence(draw, 6)), who + 3 * index, 1.5) for who in (0, 20)]
            length = min(map(len, both))
            first, second = (0.5 * one[:length] for one in both)
            for kind, samples in (("s1", first), ("s2", second), ("mix_clean", first + second)):
                folder = out / "wav16k" / "min" / part / kind
                write_audio(folder / f"{part}-{index:04d}_{index + 1:04d}.wav", samples)


GENERATORS: dict[str, Callable[[Path, Voices, int, int], None]] = {
    "PR": _librispeech,
    "ASR": _librispeech,
    "KS": _keyword_spotting,
    "QbE": _quesst,
    "SID": _voxceleb,
    "ASV": _voxceleb,
    "SD": _diarization,
    "IC": _fluent_commands,
    "SF": _snips,
    "ER": _iemocap,
    "SE": _voicebank,
    "SS": _libri2mix,
}
"""Task -> writer of its corpus."""


def generate(task: str, out: str | Path, *, voices: str = "tones", scale: int = 4, seed: int = 0) -> Path:
    """Write a small corpus of generated voices in the layout that `task` reads.

    Parameters
    ----------
    task : one of :data:`GENERATORS`
    out : root folder of the corpus, as the recipe's ``--data`` takes it
    voices : "tones" or "espeak"
    scale : 2 or more; the training part grows with it
    seed : the same seed gives the same corpus (tones; eSpeak NG in a fresh process)

    Returns
    -------
    The root folder

    Raises
    ------
    UnknownTask, or MissingPackage for voices="espeak" without espeakng-loader.

    Examples
    --------
    >>> import tempfile
    >>> root = generate("IC", tempfile.mkdtemp(), scale=2)
    >>> sorted(path.name for path in (root / "data").iterdir())
    ['test_data.csv', 'train_data.csv', 'valid_data.csv']
    """
    if task not in GENERATORS:
        raise UnknownTask(f"unknown task {task!r}; the tasks are {', '.join(GENERATORS)}")
    if scale < 2:
        raise CorpusError(f"scale: got {scale}, expected 2 or more, so that every split has enough utterances")
    root = Path(out).absolute()
    root.mkdir(parents=True, exist_ok=True)
    GENERATORS[task](root, Voices(voices, seed), scale, seed)
    logger.info("%s: wrote a generated %s corpus (%s voices, scale %d)", root, task, voices, scale)
    return root


def _flacs(folder: Path) -> list[Path]:
    found = [path for path in find_audio(folder) if path.suffix.lower() in (".flac", ".wav")]
    if not found:
        raise CorpusError(f"{folder}: no .wav or .flac file; expected the layout that --help describes")
    return found


def _speech_voxceleb(speech: Path, out: Path, seed: int, limit: int | None) -> None:
    people = {who.name: _flacs(who)[:limit] for who in sorted((speech / "digits").iterdir()) if who.is_dir()}
    lay_out_voxceleb1(people, out, join_seconds=3.0, seed=seed)


def _speech_verification(speech: Path, out: Path, seed: int, limit: int | None) -> None:
    people = {who.name: _flacs(who)[:limit] for who in sorted((speech / "digits").iterdir()) if who.is_dir()}
    lay_out_voxceleb1(people, out, join_seconds=3.0, seed=seed, test_speakers=sorted(people)[-2:])


def _speech_keywords(speech: Path, out: Path, seed: int, limit: int | None) -> None:
    """Wake words take the place of Speech Commands' first words, for s3prl's class names are fixed."""
    words = [p for p in sorted((speech / "keywords").iterdir()) if p.is_dir()][: len(_KEYWORDS)]
    meaning = {}
    for keyword, folder in zip(_KEYWORDS, words, strict=False):
        meaning[keyword] = folder.name
        files = _flacs(folder)[:limit]
        random.Random(f"{seed}-{keyword}").shuffle(files)
        tested, valid = max(1, len(files) // 5), max(1, len(files) // 10)
        names = {"train": iter(_hash_names("train", len(files))), "valid": iter(_hash_names("valid", len(files)))}
        for index, file in enumerate(files):
            clip = read_clip(file)
            if index < tested:
                write_audio(out / "test" / keyword / f"{file.stem}_nohash_0.wav", clip)
            else:
                split = "valid" if index < tested + valid else "train"
                write_audio(out / "train" / keyword / f"{next(names[split])}_nohash_0.wav", clip)
    _background(out, np.random.default_rng(seed))
    write_text(out / "classes.json", json.dumps(meaning, indent=1) + "\n")


def _commands(speech: Path, seed: int, limit: int | None) -> dict[str, list[tuple[Path, dict[str, str]]]]:
    folder = speech / "commands"
    labels = json.loads((folder / "labels.json").read_text())
    names = sorted(labels)
    random.Random(seed).shuffle(names)
    names = names[:limit]
    held = max(1, len(names) // 10)
    parts = {"test": names[: 2 * held], "valid": names[2 * held : 3 * held], "train": names[3 * held :]}
    return {part: [(folder / f"{n}.flac", labels[n]["slots"]) for n in own] for part, own in parts.items()}


def _speech_intents(speech: Path, out: Path, seed: int, limit: int | None) -> None:
    """Coffee orders as intents: action = number of shots, object = drink, location = roast ("none" where unsaid)."""
    parts = _commands(speech, seed, limit)
    rows: dict[str, list[tuple[str, ...]]] = {}
    known = {
        key: {slots.get(key, "none").strip() for _, slots in parts["train"]}
        for key in ("numberOfShots", "coffeeDrink", "roast")
    }
    for part, entries in parts.items():
        for file, slots in entries:
            values = tuple(slots.get(key, "none").strip() for key in known)
            if all(value in known[key] for key, value in zip(known, values, strict=True)):
                path = f"wavs/speakers/unknown/{file.stem}.wav"
                write_audio(out / path, read_clip(file))
                rows.setdefault(part, []).append((path, "unknown", "coffee order", *values))
    _write_fluent_csv(out, rows)


def _speech_slots(speech: Path, out: Path, seed: int, limit: int | None) -> None:
    """Coffee orders as slots. Only the slots' words are transcribed, in a fixed order: the labels hold no sentence."""
    named = {"train": "Ivy", "valid": "Amy", "test": "Brian"}
    entries = []
    for part, orders in _commands(speech, seed, limit).items():
        for index, (file, slots) in enumerate(orders):
            name = f"{named[part]}-snips-{part}-{index}"
            write_audio(out / part / f"{name}.wav", read_clip(file))
            sentence = [(word.upper(), slot) for slot in sorted(slots) for word in slots[slot].split()]
            entries.append((name, sentence))
    _write_snips_text(out, entries)


SPEECH: dict[str, Callable[[Path, Path, int, int | None], None]] = {
    "SID": _speech_voxceleb,
    "ASV": _speech_verification,
    "KS": _speech_keywords,
    "IC": _speech_intents,
    "SF": _speech_slots,
}
"""Tasks that real recordings can be laid out for."""


def lay_out_speech(task: str, speech: str | Path, out: str | Path, *, seed: int = 0, limit: int | None = None) -> Path:
    """Lay real recordings out as the corpus of `task`.

    Parameters
    ----------
    task : one of :data:`SPEECH`
    speech : folder with ``digits/<speaker>/*`` (SID, ASV), ``keywords/<word>/*`` (KS) or ``commands/*`` with
        ``labels.json`` of ``{"slots": {...}}`` (IC, SF)
    out : root of the corpus
    limit : recordings used of each speaker or word, or in all (IC, SF)

    Raises
    ------
    UnknownTask if `task` has no such layout; CorpusError if the recordings are absent or damaged.
    """
    if task not in SPEECH:
        raise UnknownTask(f"no real-speech layout for task {task!r}; there is one for {', '.join(SPEECH)}")
    part = {"SID": "digits", "ASV": "digits", "KS": "keywords", "IC": "commands", "SF": "commands"}[task]
    if not (Path(speech) / part).is_dir():
        raise CorpusError(f"{speech}: no folder {part!r} in it, which {task} is laid out from")
    root = Path(out).absolute()
    root.mkdir(parents=True, exist_ok=True)
    SPEECH[task](Path(speech), root, seed, limit)
    return root


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """Add the verb ``corpus``, which sets ``func(args) -> exit status``."""
    _add_options(commands.add_parser("corpus", help="write a small corpus in the layout of one SUPERB task", **_HELP))


_HELP: dict[str, Any] = {
    "description": "Write a small corpus in the on-disk layout of one SUPERB task.",
    "epilog": "layout of --speech: digits/<speaker>/*.flac (SID, ASV), keywords/<word>/*.flac (KS), "
    "commands/*.flac + labels.json (IC, SF)",
}


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", required=True, choices=list(GENERATORS), help="whose corpus")
    parser.add_argument("--out", required=True, type=Path, help="folder to write into")
    parser.add_argument(
        "--voices", default="tones", choices=KINDS, help="tones need nothing; espeak is synthetic speech"
    )
    parser.add_argument("--speech", type=Path, help="lay out these real recordings instead")
    parser.add_argument("--scale", type=int, default=4, help="size of the training part (default 4)")
    parser.add_argument("--limit", type=int, help="with --speech: use this many recordings of each class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--once", action="store_true", help="do nothing if the folder is whole; processes that start at once wait"
    )
    parser.set_defaults(func=_corpus)


def once(out: str | Path, make: Callable[[Path], object]) -> Path:
    """Call `make` to fill the folder `out`, unless that was done; processes that ask at once wait for the first.

    A file ``.whole`` says that it was done. What an interrupted attempt left is removed.

    Examples
    --------
    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp()) / "data"
    >>> for _ in range(2):
    ...     _ = once(root, lambda out: print("made"))
    made
    """
    root = Path(out).absolute()
    with locked(root.with_name(f".{root.name}.lock"), str(root), timeout=-1):
        if not (root / ".whole").is_file():
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir(parents=True)
            make(root)
            write_text(root / ".whole", "")
    return root


def _corpus(args: argparse.Namespace) -> int:
    def make(out: Path) -> object:
        if args.speech:
            return lay_out_speech(args.task, args.speech, out, seed=args.seed, limit=args.limit)
        return generate(args.task, out, voices=args.voices, scale=args.scale, seed=args.seed)

    if args.once:
        once(args.out, make)
    else:
        make(args.out)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m s3prl_speaker_upstreams.demo.corpora", **_HELP)
    _add_options(parser)
    return run_command(parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
