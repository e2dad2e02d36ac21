#!/usr/bin/env python3
"""Phone and word times for any English corpus with transcripts, by forced alignment with pocketsphinx.

    pip install pocketsphinx                                   (or this package with the extra `align`)
    python recipes/probe/align.py AUDIO TRANSCRIPTS -o OUT
    cka-addon probe -m MODEL -a AUDIO -l phone=OUT/phones.ctm -l word=OUT/words.ctm --ignore SIL,'<sil>' -o ...

AUDIO        folder of recordings, or a list file, as everywhere in cka-addon
TRANSCRIPTS  table.tsv:COLUMN or table.csv:COLUMN (utterance and transcript), a text file of `utterance words ...` lines
             (LibriSpeech's *.trans.txt, Kaldi's text), or a folder of such files
OUT          phones.ctm, words.ctm (utterance channel start duration label), aligned.json (what failed and why)

250 ms of noise of +-3 least significant bits are put at both ends and taken away from the times again, and the search
over the word graph is left out (bestpath=False): with pocketsphinx's own settings a third of clean sentences fails.
Words that the dictionary lacks fail their utterance and are counted by name. Phones are ARPAbet without stress. What is
there already is not done again.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cka_addon import audio
from cka_addon.errors import CkaError, require
from cka_addon.probe.errors import LabelError
from cka_addon.probe.labels import match_names, parse_label, read_labels
from cka_addon.provenance import write_atomically, write_json

PAD = 0.25  # seconds at both ends
DITHER = 3  # least significant bits of 16
FRAME = 0.01  # seconds


def read_transcripts(source: str) -> dict[str, str]:
    """Utterance -> transcript from any of the forms above."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted([*path.rglob("*.trans.txt"), *path.rglob("text")])
        if not files:
            raise LabelError(f"{path}: holds no *.trans.txt and no file called text; expected one of them")
    elif path.is_file():
        files = [path]
    else:
        return read_labels(parse_label(source), kind="class").utterances
    found = {}
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
            name, _, words = line.strip().replace("\t", " ").partition(" ")
            if name and not words.strip():
                raise LabelError(f"{file}:{number}: has no words behind '{name}'; expected 'utterance words ...'")
            if name:
                found[name] = words.strip()
    return found


def clean(text: str) -> str:
    """Words as the dictionary has them: lower case, letters and apostrophes.

    >>> clean("He's   HERE, now.")
    "he's here now"
    """
    return " ".join(re.findall(r"[a-z][a-z']*", text.lower().replace("\u2019", "'")))


class Aligner:
    """pocketsphinx with its English model."""

    def __init__(self) -> None:
        sphinx = require("pocketsphinx", "pip install pocketsphinx", "aligning")
        self.decoder: Any = sphinx.Decoder(lm=None, bestpath=False, samprate=audio.SAMPLE_RATE, loglevel="FATAL")

    def unknown(self, text: str) -> list[str]:
        """Words that the dictionary lacks."""
        return [w for w in text.split() if self.decoder.lookup_word(w) is None]

    def align(self, wav: np.ndarray, text: str, seed: int = 0) -> tuple[list[tuple], list[tuple]]:
        """(words, phones), each (start, duration, label) in seconds. Raises LabelError where the words do not fit."""
        pad = np.zeros(int(PAD * audio.SAMPLE_RATE))
        samples = np.concatenate([pad, wav * 32767, pad])
        noise = np.random.default_rng(seed).integers(-DITHER, DITHER + 1, len(samples))
        noise[len(pad) : -len(pad)] = 0
        raw = np.clip(np.round(samples) + noise, -32768, 32767).astype(np.int16).tobytes()
        try:
            self.decoder.set_align_text(text)
            self._run(raw)
            if self.decoder.hyp() is None:
                raise LabelError("does not fit its words")
            # The second search, for phones, has no hypothesis of its own: asking it for one ends the process.
            self.decoder.set_alignment()
            self._run(raw)
            found = self.decoder.get_alignment()
        except RuntimeError as error:
            raise LabelError(f"does not fit its words ({error})") from error
        if found is None:
            raise LabelError("does not fit its words")
        seconds = len(wav) / audio.SAMPLE_RATE
        words, phones = [], []
        for word in found:
            words += _within(word.start, word.duration, re.sub(r"\(\d+\)$", "", word.name), seconds)
            for phone in word:
                phones += _within(phone.start, phone.duration, phone.name, seconds)
        return words, phones

    def _run(self, raw: bytes) -> None:
        self.decoder.start_utt()
        self.decoder.process_raw(raw, full_utt=True)
        self.decoder.end_utt()


def _within(start: int, frames: int, label: str, seconds: float) -> list[tuple]:
    """The part of a segment that lies in the recording itself, as a list of at most one."""
    begin = max(0.0, start * FRAME - PAD)
    end = min(seconds, (start + frames) * FRAME - PAD)
    return [(round(begin, 3), round(end - begin, 3), label)] if end - begin > 1e-3 else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audio", metavar="AUDIO")
    parser.add_argument("transcripts", metavar="TRANSCRIPTS")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N recordings")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args()
    try:
        return run(options)
    except CkaError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1


def run(options: argparse.Namespace) -> int:
    """Align what is not aligned yet and write the files."""
    recordings = {r.id: r for r in audio.find_recordings(options.audio, limit=options.limit)}
    transcripts = read_transcripts(options.transcripts)
    names, _ = match_names(sorted(transcripts), sorted(recordings), "transcripts")
    memory = options.out / "aligned.json"
    done: dict[str, Any] = json.loads(memory.read_text()) if memory.is_file() else {}
    aligner = Aligner()
    unknown: Counter[str] = Counter()

    def save() -> None:
        write_json(memory, done)

    for count, (name, utterance) in enumerate(tqdm(sorted(names.items()), desc="align", disable=options.quiet), 1):
        text = clean(transcripts[name])
        if done.get(utterance, {}).get("text") == text:
            unknown.update(done[utterance].get("unknown", ()))
            continue
        entry: dict[str, Any] = {"text": text}
        if missing := aligner.unknown(text):
            entry |= {"problem": "words that the dictionary lacks", "unknown": missing}
            unknown.update(missing)
        else:
            try:
                entry["words"], entry["phones"] = aligner.align(audio.load(recordings[utterance])[0].numpy(), text)
            except CkaError as error:
                entry["problem"] = str(error)
        done[utterance] = entry
        if count % 200 == 0:
            save()
    save()
    good = {u: done[u] for u in sorted(names.values()) if "words" in done[u]}
    for kind in ("words", "phones"):
        lines = [f"{u} 1 {a:.3f} {d:.3f} {label}" for u, entry in good.items() for a, d, label in entry[kind]]

        def write(path: Path, lines: list[str] = lines) -> None:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")

        write_atomically(options.out / f"{kind}.ctm", write)
    sys.stdout.write(f"{len(good)} of {len(names)} utterances aligned; {options.out}/phones.ctm, words.ctm\n")
    if unknown:
        often = ", ".join(f"{w} ({n})" for w, n in unknown.most_common(10))
        sys.stdout.write(f"words that the dictionary lacks: {often}\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
