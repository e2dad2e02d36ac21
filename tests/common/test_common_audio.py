"""One rule for recordings: what is found, what is refused, what a channel is."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from s3prl_speaker_upstreams.common.audio import find_audio, probe, read_audio, write_audio
from s3prl_speaker_upstreams.errors import BadAudio, DamagedAudio

WAVE = (0.3 * np.sin(np.arange(32000) * 0.05)).astype(np.float32)


def test_channels_are_averaged(tmp_path):
    left, right = WAVE, np.roll(WAVE, 40)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], 1), 16000, subtype="FLOAT")
    assert np.array_equal(read_audio(tmp_path / "stereo.wav")[0], np.stack([left, right], 1).mean(1))
    assert np.array_equal(read_audio(tmp_path / "stereo.wav", 100, 50)[0], ((left + right) / 2)[100:150])


@pytest.mark.parametrize("kind", ["wav", "aiff", "au", "w64", "flac", "ogg", "mp3", "sph"])
def test_whole_files_are_read_and_half_files_refused(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    soundfile.write(path, WAVE, 16000, format={"sph": "NIST", "mp3": "MP3"}.get(kind))
    assert len(read_audio(path)[0]) == pytest.approx(len(WAVE), abs=3000 if kind == "mp3" else 0)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadAudio):
        read_audio(path)


def test_a_stream_of_unknown_length_is_whole(tmp_path):
    """Programs that write a wav to a pipe put 2 or 4 GiB where the length belongs."""
    path = tmp_path / "a.wav"
    soundfile.write(path, WAVE, 16000, subtype="PCM_16")
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    for placeholder in (0xFFFFFFFF, 0x7FFFFFFF):
        data[at : at + 4] = placeholder.to_bytes(4, "little")
        path.write_bytes(data)
        assert len(read_audio(path)[0]) == len(WAVE)


@pytest.mark.parametrize("rate", [1, 500, 400000])
def test_impossible_rates_are_refused(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", WAVE, rate)
    with pytest.raises(BadAudio, match="sample rate"):
        probe(tmp_path / "a.wav")


def test_values_that_are_not_finite_are_refused(tmp_path):
    wave = WAVE.copy()
    wave[7] = np.nan
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="FLOAT")
    with pytest.raises(DamagedAudio, match="finite"):
        read_audio(tmp_path / "a.wav")


def test_the_walk_follows_links_and_leaves_hidden_files(tmp_path):
    elsewhere = tmp_path / "disk2" / "speaker2"
    write_audio(elsewhere / "b.wav", WAVE)
    corpus = tmp_path / "corpus"
    write_audio(corpus / "speaker1" / "a.flac", WAVE)
    (corpus / "speaker1" / "._a.flac").write_bytes(b"\0\5\26\7")
    (corpus / "speaker2").symlink_to(elsewhere)
    (corpus / "speaker1" / "again").symlink_to(corpus)
    assert [str(p.relative_to(corpus)) for p in find_audio(corpus)] == ["speaker1/a.flac", "speaker2/b.wav"]
