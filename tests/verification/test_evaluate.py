"""Evaluation: an oracle scores 0, an ear for the microphone is found out, and real digits give the known picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from s3prl_speaker_upstreams.data.manifest import Manifest, build_manifest
from s3prl_speaker_upstreams.errors import ConfigError
from s3prl_speaker_upstreams.verification.digits import digits_test, evaluate_digits, split_recordings
from s3prl_speaker_upstreams.verification.embedding import embed_all, embed_files, fbank_statistics
from s3prl_speaker_upstreams.verification.evaluate import verification
from s3prl_speaker_upstreams.verification.tables import table, write_rows
from s3prl_speaker_upstreams.verification.trials import Trials

RATE = 8000
TONES = {"ann": 500.0, "bob": 900.0, "cas": 1400.0, "dan": 2000.0}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Four speakers, each a tone in noise of a colour of its own: the colour is the microphone."""
    root = tmp_path_factory.mktemp("clips")
    time = np.arange(int(0.5 * RATE)) / RATE
    for number, (speaker, hertz) in enumerate(TONES.items()):
        (root / speaker).mkdir()
        for clip in range(30):
            rng = np.random.default_rng(100 * number + clip)
            hiss = np.convolve(rng.normal(size=len(time)), [1, (number - 1.5) / 2], "same")
            wav = 0.2 * np.sin(2 * np.pi * hertz * time + rng.uniform(0, 6)) + 0.02 * hiss + clip * 1e-7
            soundfile.write(root / speaker / f"{clip}.flac", wav, RATE)
    return root


def pitch(wavs: list[np.ndarray]) -> np.ndarray:
    """Which of the four tones is loudest: knows the speaker through any channel."""
    rows = []
    for wav in wavs:
        spectrum = np.abs(np.fft.rfft(wav * np.hanning(len(wav))))
        hertz = np.fft.rfftfreq(len(wav), 1 / 16000)
        near = [spectrum[np.abs(hertz - tone) < 5].max() / np.median(spectrum[np.abs(hertz - tone) < 100])
                for tone in TONES.values()]  # fmt: skip
        rows.append(np.eye(4)[int(np.argmax(near))] + 1e-3 * np.array(near) / max(near))
    return np.array(rows)


def colour(wavs: list[np.ndarray]) -> np.ndarray:
    """Balance of the hiss between the tones: knows the microphone only."""
    bands = [(150, 350), (600, 800), (1000, 1300), (1500, 1900), (2100, 2500)]
    rows = []
    for wav in wavs:
        power, hertz = np.abs(np.fft.rfft(wav)) ** 2, np.fft.rfftfreq(len(wav), 1 / 16000)
        rows.append([np.log(np.median(power[(hertz > low) & (hertz < high)]) + 1e-12) for low, high in bands])
    out = np.array(rows)
    return out - out.mean(1, keepdims=True)


def chance(wavs: list[np.ndarray]) -> np.ndarray:
    return np.array([np.random.default_rng(int(1e6 * np.abs(wav).sum()) % 2**32).normal(size=8) for wav in wavs])


def test_digits_are_joined_from_clips_of_one_speaker_without_repetition(clips):
    test = digits_test(clips, seconds=1.2, per_speaker=8, seed=1)
    assert test.speakers == [name for name in TONES for _ in range(8)] and len(test) == 32
    assert all(wav.shape == (19200,) and wav.dtype == np.float32 for wav in test.wavs)
    assert test.band_hz == 4000.0
    assert [list(TONES)[row.argmax()] for row in pitch(test.wavs)] == test.speakers
    assert len({wav[:7000].tobytes() for wav in test.wavs}) == 32
    again, other = (
        digits_test(clips, seconds=1.2, per_speaker=8, seed=1),
        digits_test(clips, seconds=1.2, per_speaker=8),
    )
    assert all(np.array_equal(a, b) for a, b in zip(test.wavs, again.wavs, strict=True))
    assert not np.array_equal(test.wavs[0], other.wavs[0])
    with pytest.raises(ConfigError, match="15 s of clips, enough for 10 recordings of 1.2 s, expected 11"):
        digits_test(clips, seconds=1.2, per_speaker=11)


def test_channel_test_tells_speaker_from_microphone(clips):
    test = digits_test(clips, seconds=1.2, per_speaker=8)
    embeds = {"pitch": pitch, "colour": colour, "chance": chance}
    train = build_manifest(clips, min_seconds=0.1, cache=False, progress=False)
    rows = evaluate_digits(embeds, test, train, channel_draws=2, wccn_crops=3, bootstrap_samples=20, progress=False)
    rates = {(row["name"], row["test"], row["scoring"]): row["eer"] for row in rows}
    assert len(rates) == 3 * 2 * 3
    assert rates["pitch", "clean", "cosine"] == 0 and rates["colour", "clean", "cosine"] < 0.2
    assert rates["pitch", "channel", "cosine"] < 0.1 and rates["colour", "channel", "cosine"] > 0.35
    assert all(0.4 < rates["chance", name, "cosine"] < 0.6 for name in ("clean", "channel"))
    trials = {row["test"]: (row["trials"], row["targets"]) for row in rows}
    assert trials == {"clean": (496, 112), "channel": (992, 224)}
    assert all(row["eer_low"] <= row["eer"] <= row["eer_high"] for row in rows if row["name"] != "pitch")
    again = evaluate_digits({"colour": colour}, test, train, channel_draws=2, wccn_crops=3, bootstrap_samples=20)
    assert again == [row for row in rows if row["name"] == "colour"]  # what else is measured changes nothing
    text = table(rows)
    assert len(text.splitlines()) == 19 and "EER %" in text and "colour" in text


def test_what_a_scoring_is_fitted_with_is_not_what_it_is_tested_with(clips):
    paths = [item.path for item in build_manifest(clips / "ann", cache=False, min_seconds=0.1, progress=False)]
    fit, test = split_recordings(str(clips / "ann"))
    assert not set(fit) & set(test) and sorted(fit + test) == paths
    with pytest.raises(ConfigError, match="at least two"):
        split_recordings(paths[:1])


def test_embed_must_return_one_row_per_waveform():
    wavs = [np.zeros(10, dtype=np.float32)] * 5
    sizes = []
    out = embed_all(lambda part: (sizes.append(len(part)), np.ones((len(part), 3)))[1], wavs, batch_size=2)
    assert sizes == [2, 2, 1] and out.shape == (5, 3)
    with pytest.raises(ConfigError, match="got shape \\(1, 3\\) for 2"):
        embed_all(lambda part: np.ones((1, 3)), wavs, batch_size=2)
    with pytest.raises(ConfigError, match="finite"):
        embed_all(lambda part: np.full((len(part), 3), np.nan), wavs)


def test_verification_of_a_trial_list(clips, tmp_path):
    names = [f"{speaker}/{clip}" for speaker in TONES for clip in range(4)]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    labels = [int(a.split("/")[0] == b.split("/")[0]) for a, b in pairs]
    lines = [f"{label} {a}.wav {b}.wav" for label, (a, b) in zip(labels, pairs, strict=True)]
    (tmp_path / "trials.txt").write_text("\n".join(lines))  # the list says wav, the files are flac
    cohort = build_manifest(clips, min_seconds=0.1, cache=False, progress=False)
    out = verification(pitch, tmp_path / "trials.txt", clips, cohort=cohort, top_n=3, progress=False)
    assert out["eer"] == out["mean_eer"] == out["min_dcf_0.01"] == 0 and out["asnorm_eer"] <= 0.05
    assert (out["trials"], out["targets"]) == (120, 24)
    bare = verification(chance, tmp_path / "trials.txt", clips, progress=False)
    assert 0.3 < bare["eer"] < 0.7 and "asnorm_eer" not in bare
    with pytest.raises(ConfigError, match="no such recording"):
        verification(pitch, Trials(np.array([1, 0]), ("x", "x"), ("y", "z")), clips, progress=False)


def test_files_are_gathered_and_cut(clips):
    paths = [str(clips / "ann" / f"{clip}.flac") for clip in range(5)]
    sizes = []

    def embed(wavs):
        sizes.append(len(wavs))
        return np.array([[len(wav)] for wav in wavs])

    assert embed_files(embed, paths, batch_seconds=1.0).tolist() == [[8000.0]] * 5
    assert sizes == [2, 2, 1]
    assert embed_files(embed, paths, max_seconds=0.25).tolist() == [[4000.0]] * 5


def test_rows_are_written_with_what_made_them(tmp_path):
    rows = [{"name": "a", "eer": 0.25}, {"name": "b", "eer": 0.5, "extra": 1}]
    csv_path, json_path = write_rows(rows, tmp_path / "out" / "digits", settings={"seed": 3})
    assert csv_path.read_text().splitlines() == ["name,eer,extra", "a,0.25,", "b,0.5,1"]
    record = json.loads(json_path.read_text())
    assert record["rows"] == rows and record["settings"] == {"seed": 3} and record["versions"]
    assert "25.00" in table(rows) and "minDCF" not in table(rows)


def test_fbank_statistics_are_mean_and_deviation():
    rng = np.random.default_rng(0)
    wavs = [rng.normal(0, 0.1, size).astype(np.float32) for size in (16000, 24000)]
    embed = fbank_statistics()
    both = embed(wavs)
    assert both.shape == (2, 160)
    np.testing.assert_allclose(both[1], embed(wavs[1:])[0], atol=1e-4)  # alone as in a batch
    louder = embed([wavs[0] * 10])[0]
    np.testing.assert_allclose(louder[:80] - both[0, :80], 20.0, atol=0.01)  # dB
    np.testing.assert_allclose(louder[80:], both[0, 80:], atol=0.01)


def test_real_digits_give_the_known_picture(speech):
    """FBANK on clean digits: 7 to 10 % under cosine, far less under whitening; lost when the channel is random."""
    test = digits_test(speech / "digits", per_speaker=12)
    train = build_manifest(speech / "commands", cache=False, progress=False)
    rows = evaluate_digits(
        {"fbank": fbank_statistics()},
        test,
        Manifest.subset(train, range(150)),
        noise=str(speech / "noise"),
        rirs=str(speech / "rirs"),
        channel_draws=1,
        wccn_crops=2,
        bootstrap_samples=0,
        progress=False,
    )
    rates = {(row["test"], row["scoring"]): row["eer"] for row in rows}
    assert 0.04 < rates["clean", "cosine"] < 0.14
    assert rates["clean", "whitening"] < 0.6 * rates["clean", "cosine"]
    assert rates["channel", "cosine"] > 0.2
