"""torchaudio's I/O through soundfile, against the real thing where the installed torchaudio still has it."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from s3prl_speaker_upstreams.compat import torchaudio_io
from s3prl_speaker_upstreams.compat._errors import AudioUnreadable, UnsupportedAudioOption

pytestmark = pytest.mark.compat

KINDS = [
    ("wav", "PCM_16", 16000, 1),
    ("wav", "PCM_24", 16000, 2),
    ("wav", "PCM_32", 8000, 1),
    ("wav", "PCM_U8", 8000, 1),
    ("wav", "FLOAT", 44100, 2),
    ("wav", "ULAW", 8000, 1),
    ("flac", "PCM_16", 16000, 1),
    ("flac", "PCM_24", 16000, 1),
]

legacy = pytest.mark.skipif(
    not hasattr(torchaudio, "list_audio_backends"),
    reason=f"torchaudio {torchaudio.__version__} has no reader to compare with",
)


def write(folder, kind, subtype, rate, channels):
    path = folder / f"{subtype}-{channels}.{kind}"
    samples = np.random.default_rng(7).uniform(-0.9, 0.9, (1000, channels))
    soundfile.write(path, samples, rate, subtype=subtype)
    return path, samples


@pytest.mark.parametrize("kind, subtype, rate, channels", KINDS)
def test_load_gives_the_samples(tmp_path, kind, subtype, rate, channels):
    path, samples = write(tmp_path, kind, subtype, rate, channels)
    wav, got = torchaudio_io.load(path)
    assert got == rate and wav.dtype == torch.float32 and wav.shape == (channels, 1000)
    step = {"PCM_U8": 2**-7, "ULAW": 2**-5, "PCM_16": 2**-15}.get(subtype, 2**-22)
    assert np.abs(wav.numpy().T - samples).max() <= step
    part, _ = torchaudio_io.load(path, frame_offset=100, num_frames=50)
    assert torch.equal(part, wav[:, 100:150])
    turned, _ = torchaudio_io.load(path, channels_first=False)
    assert torch.equal(turned, wav.t())


def test_ranges_at_the_end(tmp_path):
    path, _ = write(tmp_path, "wav", "PCM_16", 16000, 1)
    assert torchaudio_io.load(path, frame_offset=990, num_frames=50)[0].shape == (1, 10)
    assert torchaudio_io.load(path, frame_offset=1000)[0].shape == (1, 0)
    assert torchaudio_io.load(path, frame_offset=5000, num_frames=3)[0].shape == (1, 0)
    with pytest.raises(UnsupportedAudioOption, match="frame_offset=-1"):
        torchaudio_io.load(path, frame_offset=-1)


@legacy
@pytest.mark.parametrize("backend", ["soundfile", "sox"])
@pytest.mark.parametrize("kind, subtype, rate, channels", KINDS)
def test_load_and_info_equal_torchaudio(tmp_path, kind, subtype, rate, channels, backend):
    if backend not in torchaudio.list_audio_backends():
        pytest.skip(
            f"torchaudio's {backend} backend cannot be opened here (apt-get install libsox-dev libsox-fmt-base)"
        )
    path, _ = write(tmp_path, kind, subtype, rate, channels)
    for options in ({}, {"frame_offset": 10, "num_frames": 7}, {"channels_first": False}, {"frame_offset": 2000}):
        theirs, their_rate = torchaudio.load(str(path), backend=backend, **options)
        ours, our_rate = torchaudio_io.load(str(path), **options)
        assert our_rate == their_rate and ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs) or (ours - theirs).abs().max() <= 2**-24
    theirs, ours = torchaudio.info(str(path), backend=backend), torchaudio_io.info(str(path))
    for field in ("sample_rate", "num_frames", "num_channels", "encoding"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.bits_per_sample == theirs.bits_per_sample


@legacy
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_32", "FLOAT"])
def test_native_types_equal_torchaudio(tmp_path, subtype):
    path, _ = write(tmp_path, "wav", subtype, 16000, 2)
    theirs, _ = torchaudio.load(str(path), normalize=False, backend="soundfile")
    ours, _ = torchaudio_io.load(str(path), normalize=False, backend="soundfile")
    assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


NATIVE = {"PCM_U8": torch.uint8, "PCM_16": torch.int16, "PCM_24": torch.int32, "PCM_32": torch.int32}
FORMATS = [
    *(("wav", s) for s in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")),
    *((kind, s) for kind in ("aiff", "sph", "au") for s in ("PCM_16", "PCM_24", "PCM_32")),
    ("flac", "PCM_16"),
]
SUFFIX_FORMATS = {"sph": "NIST"}


@pytest.mark.parametrize("kind, subtype", FORMATS)
def test_native_types_of_a_path(tmp_path, kind, subtype):
    """As torchaudio 2.5's sox backend, measured: every format's own integers, of FLAC and of floats float32."""
    path = tmp_path / f"a.{kind}"
    samples = np.random.default_rng(7).uniform(-0.9, 0.9, (1000, 2))
    soundfile.write(path, samples, 16000, subtype=subtype, format=SUFFIX_FORMATS.get(kind, kind.upper()))
    native, _ = torchaudio_io.load(path, normalize=False)
    expected = torch.float32 if kind == "flac" else NATIVE.get(subtype, torch.float32)
    assert native.dtype == expected
    scale = {torch.uint8: 2**7, torch.int16: 2**15, torch.int32: 2**31}.get(expected, 1)
    plain = (native.double() - (128 if expected == torch.uint8 else 0)) / scale
    assert (plain - torchaudio_io.load(path)[0]).abs().max() <= 2**-24
    if hasattr(torchaudio, "list_audio_backends") and "sox" in torchaudio.list_audio_backends():
        theirs, _ = torchaudio.load(str(path), normalize=False, backend="sox")
        assert theirs.dtype == native.dtype and (theirs.double() - native.double()).abs().max() <= 2**-24


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_samples_beyond_full_scale(tmp_path, subtype):
    """A path: clipped, as sox clips them. A file object, or the soundfile backend: as they are."""
    path = tmp_path / "loud.wav"
    soundfile.write(path, np.array([0.5, 1.5, -3.0, -0.25]), 16000, subtype=subtype)
    assert torchaudio_io.load(path)[0].tolist() == [[0.5, 1.0, -1.0, -0.25]]
    loud = [[0.5, 1.5, -3.0, -0.25]]
    assert torchaudio_io.load(io.BytesIO(path.read_bytes()))[0].tolist() == loud
    assert torchaudio_io.load(path, backend="soundfile")[0].tolist() == loud
    if hasattr(torchaudio, "list_audio_backends"):
        for backend, expected in (("sox", [[0.5, 1.0, -1.0, -0.25]]), ("soundfile", loud)):
            if backend in torchaudio.list_audio_backends():
                assert torchaudio.load(str(path), backend=backend)[0].tolist() == expected


@pytest.mark.parametrize("rate, samples", [(16000, 12345), (44100, 44100), (8000, 5000)])
def test_mp3_by_path_and_by_file_object(tmp_path, rate, samples):
    path = tmp_path / "a.mp3"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(samples), rate, format="MP3")
    trimmed, _ = torchaudio_io.load(io.BytesIO(path.read_bytes()))
    assert trimmed.shape == (1, samples)
    whole, _ = torchaudio_io.load(path)
    assert torchaudio_io.info(path).num_frames == whole.shape[1]
    assert torch.equal(torchaudio_io.load(path, frame_offset=1000, num_frames=500)[0], whole[:, 1000:1500])
    if shutil.which("sox") is None:
        pytest.skip("the sox program is not on the path (apt-get install sox)")
    assert whole.shape[1] > samples, "the encoder's delay and its last frame's padding stay, as with libsox"
    if hasattr(torchaudio, "list_audio_backends") and "sox" in torchaudio.list_audio_backends():
        theirs, _ = torchaudio.load(str(path), backend="sox")
        assert theirs.shape == whole.shape and (theirs - whole).abs().max() <= 2**-24


SAVES = [
    (torch.float32, {}),
    (torch.int16, {}),
    (torch.float32, {"encoding": "PCM_S", "bits_per_sample": 16}),
    (torch.float32, {"encoding": "PCM_F", "bits_per_sample": 32}),
    (torch.float32, {"bits_per_sample": 24}),
    (torch.float32, {"channels_first": False}),
]
FLAC_SAVES = [(torch.float32, {}), (torch.int16, {}), (torch.float32, {"bits_per_sample": 16})]


@pytest.mark.parametrize("dtype, options", SAVES)
def test_what_is_saved_is_loaded(tmp_path, dtype, options):
    path = str(tmp_path / "a.wav")
    wav = torch.linspace(-0.5, 0.5, 2000).reshape(2, 1000)
    stored = (wav * 32767).to(dtype) if dtype == torch.int16 else wav
    torchaudio_io.save(path, stored if options.get("channels_first", True) else stored.t(), 16000, **options)
    loaded, rate = torchaudio_io.load(path)
    assert rate == 16000 and (loaded - wav).abs().max() < 2e-4


@legacy
@pytest.mark.parametrize("dtype, options", SAVES)
def test_files_equal_those_of_torchaudio(tmp_path, dtype, options):
    wav = torch.linspace(-0.5, 0.5, 2000).reshape(2, 1000)
    stored = (wav * 32767).to(dtype) if dtype == torch.int16 else wav
    stored = stored if options.get("channels_first", True) else stored.t()
    torchaudio_io.save(str(tmp_path / "ours.wav"), stored, 16000, **options)
    torchaudio.save(str(tmp_path / "theirs.wav"), stored, 16000, backend="soundfile", **options)
    ours, theirs = (soundfile.info(str(tmp_path / name)) for name in ("ours.wav", "theirs.wav"))
    assert (ours.format, ours.subtype, ours.frames) == (theirs.format, theirs.subtype, theirs.frames)
    assert torch.equal(torchaudio_io.load(tmp_path / "ours.wav")[0], torchaudio_io.load(tmp_path / "theirs.wav")[0])


@legacy
@pytest.mark.parametrize("dtype, options", FLAC_SAVES)
def test_flac_files_equal_those_of_torchaudio(tmp_path, dtype, options):
    if "sox" not in torchaudio.list_audio_backends():
        pytest.skip("torchaudio's sox backend cannot be opened here (apt-get install libsox-dev libsox-fmt-base)")
    wav = (torch.linspace(-0.5, 0.5, 1000)[None] * (32767 if dtype == torch.int16 else 1)).to(dtype)
    ours, theirs = str(tmp_path / "ours.flac"), str(tmp_path / "theirs.flac")
    torchaudio_io.save(ours, wav, 16000, **options)
    torchaudio.save(theirs, wav, 16000, backend="sox", **options)
    assert soundfile.info(ours).subtype == soundfile.info(theirs).subtype
    assert (torchaudio_io.load(ours)[0] - torchaudio_io.load(theirs)[0]).abs().max() <= 2**-15


def test_info_can_be_cached_as_json_like_s3prl_does(tmp_path):
    path, _ = write(tmp_path, "flac", "PCM_16", 16000, 1)
    info = torchaudio_io.info(path)
    assert json.loads(json.dumps(vars(info)))["num_frames"] == 1000


def test_streams_are_read(tmp_path):
    path, _ = write(tmp_path, "flac", "PCM_16", 16000, 1)
    assert torch.equal(torchaudio_io.load(io.BytesIO(path.read_bytes()))[0], torchaudio_io.load(path)[0])


def test_unknown_options_raise(tmp_path):
    path, _ = write(tmp_path, "wav", "PCM_16", 16000, 1)
    with pytest.raises(UnsupportedAudioOption, match="expected one of"):
        torchaudio_io.set_audio_backend("sndfile")
    with pytest.raises(UnsupportedAudioOption, match="expected wav or flac"):
        torchaudio_io.save(str(tmp_path / "a.mp3"), torch.zeros(1, 10), 16000)
    with pytest.raises(UnsupportedAudioOption, match="two dimensions"):
        torchaudio_io.save(str(tmp_path / "a.wav"), torch.zeros(10), 16000)
    with pytest.raises(UnsupportedAudioOption, match="bits_per_sample=13"):
        torchaudio_io.save(str(tmp_path / "a.wav"), torch.zeros(1, 10), 16000, bits_per_sample=13)
    with pytest.raises(UnsupportedAudioOption, match="normalize=True"):
        torchaudio_io.load(io.BytesIO(write(tmp_path, "wav", "PCM_24", 16000, 2)[0].read_bytes()), normalize=False)
    with pytest.raises(AttributeError):
        torchaudio_io.load_wav("x")


def test_bad_files_say_what_to_do(tmp_path):
    with pytest.raises(AudioUnreadable, match="no such file; check the corpus root"):
        torchaudio_io.load(tmp_path / "absent.wav")
    noise = tmp_path / "noise.wav"
    noise.write_bytes(b"not audio at all")
    with pytest.raises(AudioUnreadable, match="got 16 bytes that are not audio"):
        torchaudio_io.load(noise)
    path, _ = write(tmp_path, "flac", "PCM_16", 16000, 1)
    path.write_bytes(path.read_bytes()[:1200])
    with pytest.raises(RuntimeError, match="fetch the file again"):
        torchaudio_io.load(path)


def test_other_names_are_torchaudios_own():
    assert torchaudio_io.functional is torchaudio.functional
