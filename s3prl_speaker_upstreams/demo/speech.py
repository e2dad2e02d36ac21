"""Behind ``recipes/quickstart.sh``: find speech of known speakers, and put the results side by side.

``python -m s3prl_speaker_upstreams.demo speech`` lays speech out as VoxCeleb1 and says where it came from;
``python -m s3prl_speaker_upstreams.demo summary`` prints the accuracies that the stock runner logged.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import re
import shutil
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from s3prl_speaker_upstreams.common.audio import SAMPLE_RATE, find_audio, probe
from s3prl_speaker_upstreams.common.commands import run_command
from s3prl_speaker_upstreams.common.files import write_text
from s3prl_speaker_upstreams.demo import espeak
from s3prl_speaker_upstreams.demo.voxceleb import lay_out_voxceleb1
from s3prl_speaker_upstreams.errors import BadAudio, ConfigError, DownloadError, MissingPackage

__all__ = ["accuracy", "espeak_speakers", "main", "speakers_in"]

logger = logging.getLogger(__name__)

CORPUS_URL = "https://www.openslr.org/resources/31/dev-clean-2.tar.gz"
CORPUS_MD5 = "6d7ab67ac6a1d2c993d050e16d61080d"
CORPUS = "Mini LibriSpeech dev-clean-2 (real read English, CC BY 4.0, 126 MB)"

SENTENCES = (
    "the north wind and the sun were arguing about which of them was stronger",
    "please call me back when the train has left the station",
    "seven small boats were waiting in the harbour before the storm",
    "she bought fresh bread, two lemons and a bottle of olive oil",
    "nobody remembers who painted the old wooden door blue",
    "the museum opens at nine and closes an hour after sunset",
    "a quiet river runs between the garden and the railway line",
    "we should measure twice before we cut the last piece of cloth",
    "his grandfather kept bees and sold the honey at the market",
    "tomorrow will be colder, with rain and some snow on the hills",
    "the teacher asked every child to bring a favourite book",
    "they walked along the beach until the lights went out",
    "an honest answer is worth more than a clever one",
    "the engine started at once and the bus moved off slowly",
    "put the heavy boxes on the floor and the glasses on the shelf",
    "most of the letters were written during the long winter",
    "the young doctor listened and wrote down what he heard",
    "there is a narrow path behind the church that leads to the lake",
    "when the music stopped the dancers looked at each other and laughed",
    "you can see three countries from the top of that mountain",
)


def speakers_in(folder: str | os.PathLike[str]) -> dict[str, list[Path]]:
    """Recordings by speaker, where each sub-folder of ``folder`` is one speaker (VoxCeleb, LibriSpeech, ...).

    ``wav`` folders on the way (VoxCeleb1's ``dev/wav/id10001``) are looked through.

    Raises
    ------
    ConfigError
        If fewer than two speakers with three or more recordings are found.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"{root}: no such folder; SPEECH is a folder with one sub-folder per speaker")
    for nested in ("dev/wav", "wav"):
        if (root / nested).is_dir():
            root = root / nested
    found = {}
    for speaker in sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != "."):
        recordings = [path for path in find_audio(speaker) if path.suffix.lower() in {".wav", ".flac", ".ogg"}]
        if len(recordings) >= 3:
            found[speaker.name] = recordings
    if len(found) < 2:
        raise ConfigError(
            f"{root}: got {len(found)} sub-folders with three or more wav, flac or ogg files, expected at least two; "
            "SPEECH is a folder with one sub-folder per speaker"
        )
    return found


def espeak_speakers(voices: int = 12, sentences: int = 20) -> dict[str, list]:
    """Synthetic speakers: voices of eSpeak NG, each saying the same sentences at its own rate and pitch."""
    draw = random.Random(0)
    speech = {}
    for voice in espeak.VOICES[:voices]:
        rate, pitch = draw.randint(130, 190), draw.randint(35, 65)
        speech[voice] = [
            espeak.speak(text, voice, rate=rate + draw.randint(-10, 10), pitch=pitch + draw.randint(-5, 5))
            for text in SENTENCES[:sentences]
        ]
    return speech


def _downloaded_corpus(cache: Path) -> Path:
    """Folder of the public corpus, downloaded and unpacked at first use."""
    from s3prl_speaker_upstreams.weights import download

    unpacked = cache / "LibriSpeech" / "dev-clean-2"
    if unpacked.is_dir():
        return unpacked
    archive = cache / Path(CORPUS_URL).name
    download(CORPUS_URL, archive)
    digest = hashlib.md5(archive.read_bytes()).hexdigest()
    if digest != CORPUS_MD5:
        archive.unlink()
        raise DownloadError(f"{CORPUS_URL}: got a file with md5 {digest}, expected {CORPUS_MD5}; try again later")
    beside = cache / f".unpacking.{os.getpid()}"
    with tarfile.open(archive) as tar:
        tar.extractall(beside, filter="data")
    (cache / "LibriSpeech").mkdir(parents=True, exist_ok=True)
    os.replace(beside / "LibriSpeech" / "dev-clean-2", unpacked)
    shutil.rmtree(beside)
    return unpacked


def _seconds(recording: Path | np.ndarray) -> float:
    if isinstance(recording, np.ndarray):
        return len(recording) / SAMPLE_RATE
    try:
        return probe(recording).seconds
    except BadAudio as error:
        raise ConfigError(f"{error}; or remove it") from error


def _some(speech: dict[str, list], speakers: int, seconds: float) -> dict[str, list]:
    """At most so many speakers, and so much speech of each, drawn with a fixed seed."""
    draw = random.Random(0)
    chosen: dict[str, list] = {}
    for name in sorted(draw.sample(sorted(speech), min(speakers, len(speech)))):
        total, chosen[name] = 0.0, []
        for recording in draw.sample(speech[name], len(speech[name])):
            if total >= seconds and len(chosen[name]) >= 3:
                break
            total += _seconds(recording)
            chosen[name].append(recording)
    return chosen


def _find_speech(given: str | None, cache: Path) -> tuple[dict[str, list], str, bool]:
    """Speech by speaker, where it came from in words, and whether clips should be joined to about 3 s."""
    if given:
        return speakers_in(given), f"real speech from {given}", True
    try:
        return speakers_in(_downloaded_corpus(cache)), f"real speech: {CORPUS}", False
    except (DownloadError, OSError) as error:
        logger.warning("the public corpus cannot be had: %s", error)
    try:
        return (
            espeak_speakers(),
            "SYNTHETIC speech, 12 eSpeak NG voices (no real speech was given or reachable)",
            False,
        )
    except MissingPackage as error:
        raise ConfigError(
            f"no speech: none was given, the public corpus could not be downloaded, and {error}. "
            "Set SPEECH to a folder with one sub-folder per speaker"
        ) from error


def _speech(args: argparse.Namespace) -> int:
    out = Path(args.out)
    wanted = {"given": args.speech and str(Path(args.speech).resolve()), "version": 1}
    mark = out / "demo.json"
    if mark.is_file():
        done = json.loads(mark.read_text())
        if done["wanted"] == wanted:
            print(done["said"])
            return 0
        raise ConfigError(
            f"{out}: holds speech made from {done['wanted']['given'] or 'the demo corpus'}, expected "
            f"{wanted['given'] or 'the demo corpus'}; remove that folder or set another WORK"
        )
    if out.exists():
        shutil.rmtree(out)  # ours, left by an interrupted run: the mark is written last
    speech, source, join = _find_speech(args.speech, Path(args.cache))
    speech = _some(speech, args.speakers, args.seconds)
    corpus = lay_out_voxceleb1(speech, out, join_seconds=3.0 if join else None, split=(0.7, 0.1, 0.2))
    counts = " / ".join(str(corpus.counts[part]) for part in ("train", "dev", "test"))
    said = f"{source}; {len(corpus.speakers)} speakers, {counts} utterances to train, dev, test"
    write_text(mark, json.dumps({"wanted": wanted, "said": said}, indent=1) + "\n")
    print(said)
    return 0


def accuracy(expdir: str | os.PathLike[str]) -> float:
    """Test accuracy that s3prl's SID expert logged last in ``expdir``, 0 to 1.

    Raises ``ConfigError`` if the experiment was not evaluated.
    """
    log = Path(expdir) / "log.log"
    found = re.findall(r"^test at step \d+: ([0-9.]+)$", log.read_text() if log.is_file() else "", re.MULTILINE)
    if not found:
        raise ConfigError(f"{log}: no line 'test at step N: accuracy'; evaluate the experiment first (-m evaluate)")
    return float(found[-1])


def _summary(args: argparse.Namespace) -> int:
    speakers = sum(1 for line in Path(args.speakers).read_text().splitlines()[1:] if line)
    print(f"\nSpeaker identification with the stock s3prl runner, {speakers} speakers, the same budget for all:")
    for experiment in args.experiments:
        name, _, expdir = experiment.partition("=")
        print(f"  {name:<28} test accuracy {100 * accuracy(expdir):5.1f} %")
    print(f"  {'(chance)':<28} {'':>13} {100 / speakers:5.1f} %")
    print("FBANK is mean-normalised and this probe averages over time: little is left of it, in SUPERB's table too.")
    return 0


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """Add the verbs ``speech`` and ``summary``; each sets ``func(args) -> exit status``."""
    speech = commands.add_parser("speech", help="lay speech of known speakers out as VoxCeleb1")
    speech.add_argument("--out", required=True, help="folder of the corpus")
    speech.add_argument("--cache", required=True, help="where the public corpus is downloaded to")
    speech.add_argument("--speech", help="folder of real speech, one sub-folder per speaker (default: public corpus)")
    speech.add_argument("--speakers", type=int, default=30, help="use at most so many (default 30)")
    speech.add_argument("--seconds", type=float, default=240, help="of each speaker about so much (default 240)")
    speech.set_defaults(func=_speech)
    summary = commands.add_parser("summary", help="print the logged test accuracies")
    summary.add_argument("--speakers", required=True, help="vox1_meta.csv of the corpus")
    summary.add_argument("experiments", nargs="+", metavar="NAME=EXPDIR")
    summary.set_defaults(func=_summary)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m s3prl_speaker_upstreams.demo``."""
    parser = argparse.ArgumentParser(prog="python -m s3prl_speaker_upstreams.demo", description=__doc__)
    add_parsers(parser.add_subparsers(required=True))
    return run_command(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
