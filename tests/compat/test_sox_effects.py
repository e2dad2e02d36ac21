"""Sox effects three ways: torchaudio's own libsox (legacy stack), the sox program, and the arithmetic done here."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from s3prl_speaker_upstreams.compat import sox_effects, sox_program
from s3prl_speaker_upstreams.compat._errors import AudioUnreadable, UnsupportedEffect
from s3prl_speaker_upstreams.compat.silence import Period, trim_silence

pytestmark = pytest.mark.compat

BASE = [["channels", "1"], ["rate", "16000"], ["gain", "-3.0"]]  # keyword spotting, query by example
TRIM = [*BASE, ["silence", "1", "0.1", "0.1%", "-1", "0.1", "0.1%"]]  # speaker verification
SILENCES = [
    "1 0.1 0.1% -1 0.1 0.1%",
    "1 0.1 1%",
    "2 0.05 0.3% 2 0.2 -50d",
    "1 0 0% -1 0.1 0.2%",
    "1 0.02 0.5% 1 0.3 0.5%",
    "3 0.01 0.1% -2 0.05 1%",
]

program = pytest.mark.skipif(
    shutil.which("sox") is None, reason="the sox program is not on the path (apt-get install sox)"
)


def _real_sox():
    """torchaudio's own module, whether or not another test has put the stand-in before it."""
    try:
        from torchaudio.sox_effects import sox_effects as real

        real.sox_ext.apply_effects_tensor  # noqa: B018  (opens libsox)
        return real
    except (ImportError, OSError, RuntimeError, AttributeError):
        return None


REAL = _real_sox()
libsox = pytest.mark.skipif(
    REAL is None, reason=f"torchaudio {torchaudio.__version__} has no sox effects, or no libsox.so to open (libsox-dev)"
)


def speechlike(seed: int, rate: int = 16000) -> np.ndarray:
    """Stretches of noise at levels around the thresholds, silence and loud parts."""
    draw = np.random.default_rng(seed)
    levels = (0.0, 1e-4, 5e-4, 9e-4, 1e-3, 2e-3, 0.1, 0.3)
    lengths = draw.integers(rate // 80, rate * 3 // 4, draw.integers(4, 10))
    return np.clip(np.concatenate([draw.choice(levels) * draw.standard_normal(n) for n in lengths]), -1, 1)


@pytest.fixture(scope="session")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sox")
    paths = []
    for seed in range(24):
        kind, subtype = (
            ("flac", "PCM_16") if seed % 4 == 1 else ("wav", ["PCM_16", "PCM_16", "PCM_24", "PCM_U8"][seed % 4])
        )
        samples = speechlike(seed)
        if seed % 5 == 0:
            samples = np.stack([samples, np.roll(samples, 900), samples * 0.5][: 2 + seed % 2], 1)
        paths.append(str(folder / f"{seed}.{kind}"))
        soundfile.write(paths[-1], samples, 16000, subtype=subtype)
    return paths


@pytest.fixture
def no_program(monkeypatch):
    monkeypatch.setattr(sox_program.shutil, "which", lambda name: None)


def own(path, effects):
    samples, rate, precision = sox_effects._read(path)
    wav, rate = sox_effects._run(samples, rate, precision, effects)
    return torch.from_numpy(wav.T), rate


@program
@pytest.mark.parametrize("effects", [BASE, TRIM], ids=["base", "trim"])
def test_recipe_chains_equal_the_program_bit_for_bit(recordings, effects):
    kept = 0
    for path in recordings:
        theirs, rate = sox_effects.apply_effects_file(path, effects)
        ours, our_rate = own(path, effects)
        assert (our_rate, ours.shape) == (rate, theirs.shape), path
        assert torch.equal(ours, theirs), path
        kept += ours.shape[1]
    assert kept > 16000


@program
@pytest.mark.parametrize("arguments", SILENCES)
def test_silence_equals_the_program_sample_by_sample(recordings, arguments):
    effects = [["channels", "1"], ["silence", *arguments.split()]]
    for path in recordings:
        assert torch.equal(own(path, effects)[0], sox_effects.apply_effects_file(path, effects)[0]), path


@program
@pytest.mark.parametrize(
    "effects", [[["channels", "2"]], [["channels", "4"]], [["gain", "5"]], [["gain", "0"]]], ids=str
)
def test_channels_and_gain_equal_the_program(recordings, effects):
    for path in recordings[:11]:
        assert torch.equal(own(path, effects)[0], sox_effects.apply_effects_file(path, effects)[0]), path


@libsox
@pytest.mark.parametrize("effects", [BASE, TRIM], ids=["base", "trim"])
@pytest.mark.parametrize("way", ["program", "own"])
def test_equals_torchaudios_libsox_bit_for_bit(recordings, effects, way, monkeypatch):
    if way == "program" and shutil.which("sox") is None:
        pytest.skip("the sox program is not on the path (apt-get install sox)")
    if way == "own":
        monkeypatch.setattr(sox_program.shutil, "which", lambda name: None)
    for path in recordings:
        theirs, rate = REAL.apply_effects_file(path, effects)
        ours, our_rate = sox_effects.apply_effects_file(path, effects)
        assert our_rate == rate and torch.equal(ours, theirs), path


@libsox
@pytest.mark.parametrize("effects", [BASE, TRIM], ids=["base", "trim"])
@pytest.mark.parametrize("way", ["program", "own"])
def test_tensors_equal_torchaudios_libsox(effects, way, monkeypatch):
    if way == "program" and shutil.which("sox") is None:
        pytest.skip("the sox program is not on the path (apt-get install sox)")
    if way == "own":
        monkeypatch.setattr(sox_program.shutil, "which", lambda name: None)
    for seed in range(4):
        wav = torch.from_numpy(speechlike(seed)).float()[None].repeat(2, 1)
        theirs, rate = REAL.apply_effects_tensor(wav, 16000, effects)
        ours, our_rate = sox_effects.apply_effects_tensor(wav, 16000, effects)
        assert our_rate == rate and ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 2**-23 if ours.numel() else True


@program
@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_resampling_is_soxs(tmp_path, rate):
    """Speech-like input (band-limited); white noise differs a little more at the very edge of the band."""
    time = np.arange(rate) / rate
    samples = sum(0.1 * np.sin(2 * np.pi * f * time + f) for f in (110, 440, 1230, 2750, 3300)) * np.hanning(rate)
    path = str(tmp_path / "a.wav")
    soundfile.write(path, samples, rate, subtype="PCM_16")
    theirs, ours = sox_effects.apply_effects_file(path, BASE)[0], own(path, BASE)[0]
    assert theirs.shape == ours.shape == (1, 16000)
    assert (theirs - ours).abs().max() < 5e-6
    far_off = torchaudio.functional.resample(torch.from_numpy(samples)[None], rate, 16000) * 10 ** (-3 / 20)
    assert (theirs - far_off).abs().max() > (theirs - ours).abs().max()


def test_base_chain_without_the_program(no_program):
    """At 16 kHz the chain is a multiplication."""
    wav = torch.from_numpy(speechlike(3)).float()[None]
    out, rate = sox_effects.apply_effects_tensor(wav, 16000, BASE)
    assert rate == 16000 and (out - wav * 10 ** (-3 / 20)).abs().max() <= 6e-8
    turned, _ = sox_effects.apply_effects_tensor(wav.t(), 16000, BASE, channels_first=False)
    assert torch.equal(turned.t(), out)


def test_silence_properties(no_program):
    loud, quiet = torch.full((1, 16000), 0.5), torch.zeros(1, 16000)
    trimmed, _ = sox_effects.apply_effects_tensor(torch.cat([quiet, loud, quiet, loud], 1), 16000, TRIM)
    # each loud second begins 0 samples late; sox's 20 ms window holds the level up for 320 samples after it
    assert 32000 <= trimmed.shape[1] <= 32000 + 2 * 320
    assert sox_effects.apply_effects_tensor(quiet, 16000, TRIM)[0].shape == (1, 0)
    kept, _ = sox_effects.apply_effects_tensor(loud, 16000, TRIM)
    assert kept.shape == loud.shape


def test_long_runs_cross_the_blocks_of_the_level():
    """Levels are computed 65,536 samples at a time; a stretch over several blocks is still one stretch."""
    samples = np.concatenate([np.zeros(200_000), np.full(300_000, 2**28), np.zeros(200_000)]).astype(np.int32)
    half = Period(1, 150_000, 0.1, "%")
    kept = trim_silence(samples, 16000, half, half, restart=True)
    assert 300_000 <= len(kept) <= 300_320 and (kept[:300_000] == 2**28).all()


@pytest.mark.parametrize(
    "effects, said",
    [
        ([["reverb", "50"]], "not supplied"),
        ([["norm"]], "not supplied"),
        ([["gain", "-n", "-3"]], "expected one number"),
        ([["rate", "-v", "16000"]], "expected one number"),
        ([["rate", "16k"]], "expected one number"),
        ([["channels", "0"]], "expected one number"),
        ([["silence", "-l", "1", "0.1", "1%"]], "expected `silence COUNT"),
        ([["silence", "1", "0.1", "200%"]], "expected 0% to 100%, or below 0d"),
        ([["silence", "1", "0:01", "1%"]], "expected counts, seconds"),
    ],
)
def test_anything_else_raises_with_and_without_the_program(effects, said, monkeypatch, recordings):
    for which in (shutil.which, lambda name: None):
        monkeypatch.setattr(sox_program.shutil, "which", which)
        with pytest.raises(UnsupportedEffect, match=said):
            sox_effects.apply_effects_tensor(torch.zeros(1, 100), 16000, effects)
        with pytest.raises(UnsupportedEffect, match=said):
            sox_effects.apply_effects_file(recordings[0], effects)


def test_bad_input(tmp_path, no_program, recordings):
    with pytest.raises(AudioUnreadable, match="no such file"):
        sox_effects.apply_effects_file(tmp_path / "absent.wav", BASE)
    with pytest.raises(UnsupportedEffect, match="2-D float32"):
        sox_effects.apply_effects_tensor(torch.zeros(100), 16000, BASE)
    with pytest.raises(UnsupportedEffect, match="normalize=False"):
        sox_effects.apply_effects_file(recordings[0], BASE, normalize=False)


@program
@pytest.mark.parametrize("channels", [2, 3])
@pytest.mark.parametrize("arguments", SILENCES)
def test_silence_of_several_channels_equals_the_program(channels, arguments, monkeypatch):
    draw = np.random.default_rng(channels)
    parts = [speechlike(seed) for seed in range(channels)]
    longest = max(map(len, parts))
    wav = np.stack(
        [
            np.pad(part, (int(draw.integers(0, 900)), 0))[:longest]
            for part in map(lambda p: np.resize(p, longest), parts)
        ]
    )
    effects = [["silence", *arguments.split()]]
    expected, _ = sox_effects.apply_effects_tensor(torch.from_numpy(wav.astype(np.float32)), 16000, effects)
    monkeypatch.setattr(sox_program.shutil, "which", lambda name: None)
    got, _ = sox_effects.apply_effects_tensor(torch.from_numpy(wav.astype(np.float32)), 16000, effects)
    assert torch.equal(got, expected)


@program
def test_file_names_are_names(tmp_path, monkeypatch):
    """No globbing, no options, no commands, whatever a file is called."""
    samples = speechlike(5)
    monkeypatch.chdir(tmp_path)
    soundfile.write("plain.wav", samples, 16000)
    expected, _ = sox_effects.apply_effects_file("plain.wav", BASE)
    for name in ("[a]*?.wav", "-n.wav", "|touch hacked.wav", "a b;c.wav"):
        shutil.copy("plain.wav", name)
        assert torch.equal(sox_effects.apply_effects_file(name, BASE)[0], expected), name
    assert not (tmp_path / "hacked.wav").exists()
    (tmp_path / "noise.wav").write_bytes(b"not audio")
    with pytest.raises(AudioUnreadable, match=r"noise\.wav: sox cannot process it"):
        sox_effects.apply_effects_file("noise.wav", BASE)


@pytest.mark.parametrize("with_program", [True, False])
def test_damaged_flac_raises(recordings, tmp_path, with_program, monkeypatch):
    if not with_program:
        monkeypatch.setattr(sox_program.shutil, "which", lambda name: None)
    elif shutil.which("sox") is None:
        pytest.skip("the sox program is not on the path (apt-get install sox)")
    cut = tmp_path / "cut.flac"
    with open(recordings[1], "rb") as whole:
        cut.write_bytes(whole.read()[:9000])
    with pytest.raises(AudioUnreadable, match=r"cut\.flac.*fetch"):
        sox_effects.apply_effects_file(cut, BASE)


@program
def test_cut_wav_warns(recordings, tmp_path, caplog):
    cut = tmp_path / "cut.wav"
    with open(recordings[4], "rb") as whole:
        cut.write_bytes(whole.read()[:9000])
    wav, _ = sox_effects.apply_effects_file(cut, BASE)
    assert 0 < wav.shape[1] < 4500 and "Premature EOF" in caplog.text


@program
def test_formats_that_sox_does_not_know_are_decoded_first(recordings, tmp_path):
    expected, _ = sox_effects.apply_effects_file(recordings[0], BASE)
    shutil.copy(recordings[0], tmp_path / "speech.unheardof")
    assert torch.equal(sox_effects.apply_effects_file(tmp_path / "speech.unheardof", BASE)[0], expected)


def test_child_processes_import_it_by_reference(recordings):
    """joblib's children get the function by name, without s3prl or any hook in them."""
    payload = pickle.dumps((sox_effects.apply_effects_file, recordings[0], BASE))
    assert b"s3prl_speaker_upstreams.compat.sox_effects" in payload
    code = (
        "import pickle, sys; function, path, effects = pickle.loads(sys.stdin.buffer.read()); "
        "print(function(path, effects)[0].shape[1], 's3prl' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=payload, capture_output=True, check=True)
    assert done.stdout.split() == [str(soundfile.info(recordings[0]).frames).encode(), b"False"]


def test_program_is_not_started_for_what_is_equal_without_it(tmp_path, monkeypatch):
    """KS passes 16 kHz clips by the ten thousand: a process for each would cost more than the training."""
    started = []
    monkeypatch.setattr(sox_program.shutil, "which", lambda name: "/usr/bin/sox")
    monkeypatch.setattr(sox_program, "call", lambda *a: started.append(a) or pytest.fail("the program was started"))
    draw = np.random.default_rng(0)
    soundfile.write(tmp_path / "mono.wav", draw.uniform(-0.5, 0.5, 1600), 16000)
    chain = [["channels", "1"], ["rate", "16000"], ["gain", "-3.0"]]
    wav, rate = sox_effects.apply_effects_file(tmp_path / "mono.wav", chain)
    assert wav.shape == (1, 1600) and rate == 16000
    sox_effects.apply_effects_tensor(wav, 16000, chain)
    for name, samples, samplerate in (("stereo", (1600, 2), 16000), ("slow", (800,), 8000)):
        soundfile.write(tmp_path / f"{name}.wav", draw.uniform(-0.5, 0.5, samples), samplerate)
        with pytest.raises(pytest.fail.Exception):
            sox_effects.apply_effects_file(tmp_path / f"{name}.wav", chain)
    assert len(started) == 2
