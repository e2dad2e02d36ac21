"""The corpora that s3prl's PyPI package lacks, against those of a checkout where there is one."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from s3prl_speaker_upstreams import compat
from s3prl_speaker_upstreams.compat.ctc_corpus.common_voice import CommonVoiceDataset
from s3prl_speaker_upstreams.compat.ctc_corpus.libriphone import LibriPhoneDataset, read_lexicons
from s3prl_speaker_upstreams.compat.ctc_corpus.librispeech import LibriDataset
from s3prl_speaker_upstreams.compat.ctc_corpus.snips import SnipsDataset
from s3prl_speaker_upstreams.errors import ConfigError

pytestmark = pytest.mark.compat

WORDS = {"A": "AH", "CAT": "K AE T", "SAW": "S AO", "DOG": "D AO G"}
SENTENCES = ["A CAT", "A DOG SAW A CAT", "CAT SAW DOG", "DOG", "A CAT SAW A DOG SAW A CAT", "SAW", "A A A"]


@pytest.fixture(scope="module")
def text():
    compat.install()
    pytest.importorskip("editdistance")
    from s3prl.downstream.ctc import text

    return text


@pytest.fixture(scope="module")
def original():
    """A checkout's own corpus modules by file; ``S3PRL_CHECKOUT`` or ``../peers/s3prl``."""
    root = Path(os.environ.get("S3PRL_CHECKOUT") or Path(__file__).resolve().parents[3] / "peers" / "s3prl")
    folder = root / "s3prl" / "downstream" / "ctc" / "corpus"
    if not folder.is_dir():
        pytest.skip(f"no checkout of s3prl to compare with: {folder} does not exist (set S3PRL_CHECKOUT)")

    def module(name):
        spec = importlib.util.spec_from_file_location(f"checkout_{name}", folder / f"{name}.py")
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    return module


def silence(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(160), 16000)


@pytest.fixture(scope="module")
def libri(tmp_path_factory):
    root = tmp_path_factory.mktemp("LibriSpeech")
    for split, speakers in (("train-clean-100", (19, 26)), ("dev-clean", (84,))):
        for speaker in speakers:
            chapter = root / split / str(speaker) / "198"
            for number in range(len(SENTENCES)):
                silence(chapter / f"{speaker}-198-{number:04d}.flac")
            lines = (f"{speaker}-198-{number:04d} {sentence}\n" for number, sentence in enumerate(SENTENCES))
            (chapter / f"{speaker}-198.trans.txt").write_text("".join(lines))
    (root / "lexicon.txt").write_text("".join(f"{word}\t{spoken}\n" for word, spoken in WORDS.items()) + "A EY\n")
    (root / "phoneme.txt").write_text("\n".join(sorted(set(" ".join(WORDS.values()).split()) | {"EY"})) + "\n")
    (root / "character.txt").write_text(" \n" + "\n".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ'") + "\n")
    return root


@pytest.fixture(scope="module")
def snips(tmp_path_factory):
    root = tmp_path_factory.mktemp("SNIPS")
    lines = []
    for split in ("train", "valid", "test"):
        for speaker in ("Ivy", "Joey", "Amy"):
            for number in range(4):
                name = f"{speaker}-snips-{split}-{number}"
                silence(root / split / f"{name}.wav")
                words = ["PLAY", *["SONG"] * (number + 1), "NOW"]
                labels = ["O", *["B-track"] * (number + 1), "O"]
                lines.append(f"{name} BOS {' '.join(words)} EOS\tO {' '.join(labels)} PlayMusic\n")
        silence(root / split / "Ivy-unlisted.wav")
    (root / "all.iob.snips.txt").write_text("".join(lines))
    (root / "all-trans.txt").write_text("".join(line.split("\t")[0] + "\n" for line in lines))
    (root / "slots.txt").write_text("O\nB-track\n")
    return root


def same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    assert [str(path) for path in ours.file_list] == [str(path) for path in theirs.file_list]
    assert list(ours.text) == list(theirs.text)
    for index in range(len(theirs)):
        assert repr(ours[index]) == repr(theirs[index])


@pytest.mark.parametrize("bucket_size", [1, 4, 20])
@pytest.mark.parametrize("splits", [["train-clean-100"], ["train-clean-100", "dev-clean"]])
def test_librispeech_equals_a_checkouts(libri, text, original, bucket_size, splits):
    tokenizer = text.load_text_encoder("character", str(libri / "character.txt"))
    arguments = (splits, tokenizer, bucket_size, str(libri))
    same(LibriDataset(*arguments, num_workers=0), original("librispeech").LibriDataset(*arguments, num_workers=0))


@pytest.mark.parametrize("bucket_size", [1, 4])
def test_libriphone_equals_a_checkouts(libri, text, original, bucket_size):
    tokenizer = text.load_text_encoder("word", str(libri / "phoneme.txt"))
    arguments = (["train-clean-100"], tokenizer, bucket_size, str(libri), [str(libri / "lexicon.txt")])
    same(LibriPhoneDataset(*arguments), original("libriphone").LibriPhoneDataset(*arguments))


@pytest.mark.parametrize("mode", ["character-slot", "character"])
def test_snips_equals_a_checkouts(libri, snips, text, original, mode):
    tokenizer = text.load_text_encoder(mode, str(libri / "character.txt"), str(snips / "slots.txt"))
    arguments = {"path": str(snips), "train_speakers": ["Ivy", "Joey"], "valid_speakers": ["Amy"]}
    for split in (["train"], ["valid"]):
        ours = SnipsDataset(split, tokenizer, 3, **arguments)
        same(ours, original("snips").SnipsDataset(split, tokenizer, 3, **arguments))


def test_common_voice_equals_a_checkouts(libri, text, original, tmp_path):
    tokenizer = text.load_text_encoder("character", str(libri / "character.txt"))
    rows = "".join(f"{number}.wav\t{sentence}\n" for number, sentence in enumerate(SENTENCES))
    (tmp_path / "train.tsv").write_text("path\tsentence\n" + rows)
    for options in ({}, {"ratio": 0.5, "offset": 1}):
        for part in range(len(SENTENCES)):
            silence(tmp_path / f"{part}.wav")
        arguments = ([str(tmp_path / "train.tsv")], tokenizer, 2, str(tmp_path))
        theirs = original("common_voice").CommonVoiceDataset(*arguments, **options)
        same(CommonVoiceDataset(*arguments, **options), theirs)


def test_phonemes_by_hand(libri, text):
    tokenizer = text.load_text_encoder("word", str(libri / "phoneme.txt"))
    data = LibriPhoneDataset(["dev-clean"], tokenizer, 1, str(libri), [str(libri / "lexicon.txt")])
    spoken = {path.stem[-4:]: tokenizer.decode(tokens) for path, tokens in (data[i] for i in range(len(data)))}
    assert spoken["0000"] == "AH K AE T" and spoken["0003"] == "D AO G"
    assert [len(tokens) for tokens in data.text] == sorted((len(tokens) for tokens in data.text), reverse=True)


def test_slots_by_hand(libri, snips, text):
    tokenizer = text.load_text_encoder("character-slot", str(libri / "character.txt"), str(snips / "slots.txt"))
    data = SnipsDataset(["test"], tokenizer, 1, str(snips), test_speakers=["Amy"])
    assert len(data) == 4 and all(path.name.startswith("Amy") for path in data.file_list)
    assert tokenizer.decode(data[len(data) - 1][1]).startswith("PLAY B-")


def test_pypi_package_gets_them_by_their_usual_names(libri, text):
    from s3prl.downstream.ctc.data import load_dataset

    tokenizer = text.load_text_encoder("character", str(libri / "character.txt"))
    options = {"name": "librispeech", "path": str(libri), "train": ["train-clean-100"], "dev": ["dev-clean"]}
    loader = load_dataset("train", tokenizer, {**options, "bucketing": True, "batch_size": 4, "num_workers": 0})
    wavs, texts, names = next(iter(loader))
    assert len(wavs) == len(texts) == len(names) == 4 and wavs[0].shape == (160,)
    dev = load_dataset("dev", tokenizer, {**options, "bucketing": True, "batch_size": 4, "num_workers": 1})
    assert len(list(dev)) == len(SENTENCES)
    assert "s3prl.downstream.ctc.corpus.librispeech" in sys.modules


def test_bad_corpora_say_what_is_wrong(libri, snips, text, tmp_path):
    characters = text.load_text_encoder("character", str(libri / "character.txt"))
    words = text.load_text_encoder("word", str(libri / "phoneme.txt"))
    with pytest.raises(ConfigError, match=r"test-clean: got no \.flac file"):
        LibriDataset(["test-clean"], characters, 1, str(libri))
    silence(tmp_path / "s" / "1" / "2" / "1-2-0000.flac")
    with pytest.raises(ConfigError, match=r"1-2\.trans\.txt: no such transcript"):
        LibriDataset(["s"], characters, 1, str(tmp_path))
    (tmp_path / "s" / "1" / "2" / "1-2.trans.txt").write_text("1-2-0001 A CAT\n")
    with pytest.raises(ConfigError, match="no line for 1-2-0000"):
        LibriDataset(["s"], characters, 1, str(tmp_path))
    (tmp_path / "s" / "1" / "2" / "1-2.trans.txt").write_text("1-2-0000 A ZEBRA\n")
    with pytest.raises(ConfigError, match="'ZEBRA', which none of the lexicons"):
        LibriPhoneDataset(["s"], words, 1, str(tmp_path), [str(libri / "lexicon.txt")])
    (tmp_path / "odd.txt").write_text("CAT K AE T\nZEBRA Z IY\n")
    with pytest.raises(ConfigError, match=r"odd\.txt:2: got phoneme 'Z' of 'ZEBRA'"):
        read_lexicons([str(tmp_path / "odd.txt")], ["K", "AE", "T"])
    with pytest.raises(ConfigError, match=r"corpus\.train_speakers"):
        SnipsDataset(["train"], characters, 1, str(snips))
    with pytest.raises(ConfigError, match=r"none of speakers \['Nobody'\]"):
        SnipsDataset(["train"], characters, 1, str(snips), train_speakers=["Nobody"])
    with pytest.raises(ConfigError, match=r"all-trans\.txt: no such file"):
        SnipsDataset(["train"], characters, 1, str(tmp_path), train_speakers=["Ivy"])
