"""Generated and laid out corpora: complete, deterministic, and what s3prl's own loaders read."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from s3prl_speaker_upstreams.demo import corpora, espeak
from s3prl_speaker_upstreams.demo.voices import Voices
from s3prl_speaker_upstreams.demo.voxceleb import lay_out_voxceleb1
from s3prl_speaker_upstreams.errors import ConfigError
from s3prl_speaker_upstreams.superb.checks import check_corpus
from s3prl_speaker_upstreams.superb.errors import CorpusError, UnknownTask
from s3prl_speaker_upstreams.superb.prepare import prepare
from s3prl_speaker_upstreams.superb.tasks import TASKS


def _tree(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "wav.scp"  # holds absolute paths, as Kaldi's do
    }


@pytest.mark.parametrize("task", TASKS)
def test_generated_corpus_passes_its_own_check_and_can_be_prepared(task, tmp_path):
    root = corpora.generate(task, tmp_path / "data", scale=2)
    report = check_corpus(TASKS[task], root)
    assert report.counts and all(report.counts.values()) and report.seconds > 1
    prepared = prepare(TASKS[task], root, tmp_path / "prepared")
    named = [str(value) for value in TASKS[task].settings(root, prepared).values() if isinstance(value, str)]
    assert named and all(Path(path).exists() for path in named)


@pytest.mark.parametrize("task", ["KS", "SD", "SID"])
def test_generation_is_deterministic_and_the_seed_matters(task, tmp_path):
    first, again, other = (
        _tree(corpora.generate(task, tmp_path / name, scale=2, seed=seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again
    assert first != other


def test_keyword_spotting_fills_the_splits_that_s3prl_hashes(tmp_path):
    root = corpora.generate("KS", tmp_path, scale=2)
    splits = {corpora._hash_split(path.name) for path in (root / "train" / "yes").glob("*.wav")}
    assert splits == {"train", "valid"}
    assert {path.name for path in (root / "test").iterdir()} >= {"yes", "_unknown_", "_silence_"}
    # s3prl cuts a random second out of each background noise, so every one must be longer
    assert all(soundfile.info(str(f)).frames > 16000 for f in (root / "train" / "_background_noise_").glob("*.wav"))


def test_hash_split_is_that_of_the_speech_commands_readme():
    # worked out with sha1("a") = 86f7e437faa5a7fce15d1ddcb9eaeaea377667b8: int % 2**27 / (2**27 - 1) * 100
    value = int("86f7e437faa5a7fce15d1ddcb9eaeaea377667b8", 16) % 2**27 * 100 / (2**27 - 1)
    expected = "valid" if value < 10 else "test" if value < 20 else "train"
    assert corpora._hash_split("a_nohash_3.wav") == expected


def test_intents_of_valid_and_test_are_known_in_train(tmp_path):
    root = corpora.generate("IC", tmp_path, scale=2)
    rows = {s: list(csv.DictReader((root / "data" / f"{s}_data.csv").open())) for s in ("train", "valid", "test")}
    for slot in ("action", "object", "location"):
        known = {row[slot] for row in rows["train"]}
        assert {row[slot] for part in ("valid", "test") for row in rows[part]} <= known
        assert len(known) > 1


def test_diarization_mixtures_overlap_and_their_tables_agree(tmp_path):
    root = corpora.generate("SD", tmp_path, scale=2)
    segments = [line.split() for line in (root / "train" / "segments").read_text().splitlines()]
    by_recording: dict[str, list[tuple[float, float]]] = {}
    for _, recording, start, end in segments:
        by_recording.setdefault(recording, []).append((float(start), float(end)))
    assert all(len(spans) == 2 for spans in by_recording.values())
    assert any(max(a[0], b[0]) < min(a[1], b[1]) for a, b in by_recording.values())
    seconds = dict(line.split() for line in (root / "train" / "reco2dur").read_text().splitlines())
    for recording, spans in by_recording.items():
        info = soundfile.info(str(root / "train" / "wav" / f"{recording}.wav"))
        assert abs(info.frames / 16000 - float(seconds[recording])) < 1e-3
        assert max(end for _, end in spans) <= float(seconds[recording]) + 0.01


def test_separation_sources_sum_to_the_mixture(tmp_path):
    base = corpora.generate("SS", tmp_path, scale=2) / "wav16k" / "min" / "dev"
    for mix in (base / "mix_clean").glob("*.wav"):
        parts = [soundfile.read(str(base / kind / mix.name))[0] for kind in ("s1", "s2", "mix_clean")]
        assert np.abs(parts[0] + parts[1] - parts[2]).max() < 2e-4  # three roundings to 16 bits


def test_unknown_task_lists_the_tasks_and_small_scale_is_refused(tmp_path):
    with pytest.raises(UnknownTask, match="PR, ASR, KS"):
        corpora.generate("XY", tmp_path)
    with pytest.raises(CorpusError, match="expected 2 or more"):
        corpora.generate("KS", tmp_path, scale=1)
    with pytest.raises(ConfigError, match="tones, espeak"):
        Voices("humans")


def test_command_line_writes_a_corpus(tmp_path):
    assert corpora.main(["--task", "ER", "--out", str(tmp_path / "er"), "--scale", "2"]) == 0
    assert (tmp_path / "er" / "Session5" / "dialog" / "EmoEvaluation").is_dir()


# ---------------------------------------------------------------------------------------------- VoxCeleb1 layout


def _people(count: int = 3, clips: int = 6, seconds: float = 1.0) -> dict[str, list[np.ndarray]]:
    draw = np.random.default_rng(0)
    return {
        f"person{index}": [draw.uniform(-0.2, 0.2, int(seconds * 16000)).astype(np.float32) for _ in range(clips)]
        for index in range(count)
    }


def test_voxceleb_layout_splits_every_speaker_and_counts_from_id10001(tmp_path):
    corpus = lay_out_voxceleb1(_people(), tmp_path)
    rows = [line.split() for line in corpus.identification_list.read_text().splitlines()]
    for speaker in ("id10001", "id10002", "id10003"):
        assert {part for part, name in rows if name.startswith(speaker)} == {"1", "2", "3"}
    assert all((tmp_path / "dev" / "wav" / name).is_file() for _, name in rows)
    assert corpus.counts == {"train": 12, "dev": 3, "test": 3}
    labels = [line.split()[0] for line in corpus.trials.read_text().splitlines()]
    assert set(labels) == {"0", "1"}


def test_voxceleb_trials_say_the_truth_and_test_speakers_stay_out_of_training(tmp_path):
    corpus = lay_out_voxceleb1(_people(4), tmp_path, test_speakers=["person1", "person3"])
    for line in corpus.trials.read_text().splitlines():
        label, first, second = line.split()
        assert label == str(int(first.split("/")[0] == second.split("/")[0]))
        assert (tmp_path / "test" / "wav" / first).is_file() and (tmp_path / "test" / "wav" / second).is_file()
    assert sorted(p.name for p in (tmp_path / "dev" / "wav").iterdir()) == ["id10001", "id10003"]


def test_joining_clips_keeps_every_sample_and_reaches_the_length(tmp_path):
    people = _people(2, 9, 0.5)
    corpus = lay_out_voxceleb1(people, tmp_path, join_seconds=1.4)
    for speaker, identity in corpus.speakers.items():
        lengths = [soundfile.info(str(f)).frames for f in (tmp_path / "dev" / "wav" / identity).rglob("*.wav")]
        assert sum(lengths) == sum(len(clip) for clip in people[speaker])
        assert min(lengths) >= 1.4 * 16000


def test_voxceleb_layout_resamples_files_and_refuses_what_cannot_work(tmp_path):
    paths = []
    for index in range(3):
        path = tmp_path / f"{index}.wav"
        soundfile.write(str(path), np.sin(np.arange(4000) / 5), 8000)
        paths.append(path)
    corpus = lay_out_voxceleb1({"a": paths, "b": paths}, tmp_path / "out")
    file = next((corpus.root / "dev" / "wav").rglob("*.wav"))
    assert (soundfile.info(str(file)).samplerate, soundfile.info(str(file)).frames) == (16000, 8000)
    with pytest.raises(CorpusError, match="expected 3 or more"):
        lay_out_voxceleb1({"a": paths[:2]}, tmp_path / "out")
    with pytest.raises(CorpusError, match="not among the speakers"):
        lay_out_voxceleb1({"a": paths}, tmp_path / "out", test_speakers=["z"])
    with pytest.raises(CorpusError, match="leaves none to train"):
        lay_out_voxceleb1({"a": paths}, tmp_path / "out", test_speakers=["a"])
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF....")
    with pytest.raises(CorpusError, match="cannot be read as audio"):
        lay_out_voxceleb1({"a": [broken, *paths]}, tmp_path / "out")


# ---------------------------------------------------------------------------------------------- eSpeak NG, real speech


@pytest.mark.skipif(not espeak.available(), reason="espeakng-loader is not installed")
def test_espeak_voices_differ_and_errors_name_the_remedy(tmp_path):
    clips = [espeak.speak("hello world", voice) for voice in espeak.VOICES[:4]]
    assert all(clip.dtype == np.float32 and 6000 < len(clip) < 40000 and np.abs(clip).max() > 0.05 for clip in clips)
    assert len({len(clip) for clip in clips}) > 1
    assert len(espeak.speak("hello", rate=300)) < len(espeak.speak("hello", rate=120))
    with pytest.raises(ConfigError, match="no voice 'atlantean'"):
        espeak.speak("hello", "atlantean")
    root = corpora.generate("IC", tmp_path, voices="espeak", scale=2)
    assert check_corpus(TASKS["IC"], root).counts["train"] == 8


@pytest.mark.parametrize("task", corpora.SPEECH)
def test_real_speech_is_laid_out_for_its_task(task, tmp_path, speech):
    root = corpora.lay_out_speech(task, speech, tmp_path / "data", limit=25)
    report = check_corpus(TASKS[task], root)
    prepare(TASKS[task], root, tmp_path / "prepared")
    assert all(report.counts.values())


def test_real_keywords_take_the_place_of_fixed_class_names(tmp_path, speech):
    root = corpora.lay_out_speech("KS", speech, tmp_path, limit=10)
    meaning = json.loads((root / "classes.json").read_text())
    assert set(meaning.values()) == {"alexa", "computer", "smart_mirror", "snowboy"}
    assert all((root / "train" / keyword).is_dir() and (root / "test" / keyword).is_dir() for keyword in meaning)


def test_real_speech_asked_for_where_there_is_none(tmp_path):
    with pytest.raises(UnknownTask, match="SID, ASV, KS, IC, SF"):
        corpora.lay_out_speech("SD", tmp_path, tmp_path)
    with pytest.raises(CorpusError, match="no folder 'digits'"):
        corpora.lay_out_speech("SID", tmp_path, tmp_path / "out")
