"""Manifest: every file is counted once, as kept or as one kind of left out, and nothing is read twice."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from s3prl_speaker_upstreams.common import files
from s3prl_speaker_upstreams.data import scan
from s3prl_speaker_upstreams.data.manifest import Manifest, NoSpeech, ScanReport, build_manifest, join_manifests
from s3prl_speaker_upstreams.errors import ConfigError


def write(path: Path, seconds: float = 1.5, rate: int = 16000, level: float = 0.1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(map(ord, path.name))
    soundfile.write(path, np.random.default_rng(seed).normal(0, level, int(seconds * rate)).clip(-1, 1), rate)
    return path


def build(source, **options) -> Manifest:
    return build_manifest(source, **{"cache": False, "progress": False, **options})


def test_speaker_layout_and_every_kind_of_bad_file(tmp_path):
    write(tmp_path / "ann" / "a.wav", 2.0)
    write(tmp_path / "ann" / "b.flac", 1.0, rate=8000)
    write(tmp_path / "bob" / "deep" / "c.WAV", 1.5)
    write(tmp_path / "bob" / "short.wav", 0.4)
    write(tmp_path / "bob" / "silent.wav", 2.0, level=0)
    (tmp_path / "bob" / "broken.flac").write_bytes(b"fLaC not really")
    (tmp_path / "bob" / "empty.wav").touch()
    (tmp_path / "bob" / "gone.wav").symlink_to(tmp_path / "nowhere")
    (tmp_path / "bob" / ".hidden.wav").touch()
    (tmp_path / "bob" / "notes.txt").write_text("no audio")

    lazy, decoded = build(tmp_path), build(tmp_path, silence_db=-60)
    assert [item.id for item in lazy] == ["ann/a.wav", "ann/b.flac", "bob/deep/c.WAV", "bob/silent.wav"]
    assert [item.id for item in decoded] == ["ann/a.wav", "ann/b.flac", "bob/deep/c.WAV"]
    assert decoded.speakers == ["ann", "bob"] and decoded.labels.tolist() == [0, 0, 1] and decoded.labelled
    assert decoded.durations.tolist() == [2.0, 1.0, 1.5] and decoded.sample_rates.tolist() == [16000, 8000, 16000]
    report = decoded.report
    assert (report.found, report.kept, report.too_short, report.silent, report.unreadable) == (8, 3, 1, 1, 3)
    assert "short.wav (0.40 s)" in str(report) and "1 silent" in str(report)
    assert all(Path(item.path).is_file() for item in decoded)


def test_voxceleb_layout_wherever_the_root_is(tmp_path):
    for name in ("id10001/vid/00001.wav", "id10001/other/00001.wav", "id00012/x-Y_z/00003.wav"):
        write(tmp_path / "vox1" / "wav" / name)
    for root in (tmp_path, tmp_path / "vox1" / "wav", tmp_path / "vox1" / "wav" / "id10001"):
        found = build(root)
        assert found.report.layout == "voxceleb"
        assert set(found.speakers) <= {"id10001", "id00012"}
    assert build(tmp_path).speakers == ["id00012", "id10001"]
    write(tmp_path / "vox1" / "stray.wav")
    with pytest.raises(ConfigError, match="stray.wav.*layout='speaker'"):
        build(tmp_path, layout="voxceleb")


def test_flat_folder_has_no_speakers(tmp_path):
    write(tmp_path / "a.wav"), write(tmp_path / "b.wav")
    found = build(tmp_path)
    assert found.speakers == [] and found.labels.tolist() == [-1, -1] and not found.labelled
    assert found[0].speaker is None
    with pytest.raises(ConfigError, match="'a.wav'.*<speaker>/<name>"):
        build(tmp_path, layout="speaker")
    with pytest.raises(ConfigError, match="auto, list, voxceleb, librispeech, speaker, none"):
        build(tmp_path, layout="kaldi")


def test_nothing_usable_says_what_was_found(tmp_path):
    with pytest.raises(NoSpeech, match="(?s)0 files found.*m4a"):
        build(tmp_path)
    write(tmp_path / "a.wav", 0.5)
    with pytest.raises(NoSpeech, match="1 too short"):
        build(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder or list"):
        build(tmp_path / "absent")


def test_cache_opens_only_what_changed(tmp_path, monkeypatch):
    folder, cache = tmp_path / "data", tmp_path / "cache.csv"
    for name in "abc":
        write(folder / f"{name}.wav")
    opened = []
    probe = scan.probe
    monkeypatch.setattr(scan, "probe", lambda path: (opened.append(Path(path).name), probe(path))[1])
    first = build(folder, cache=cache)
    assert sorted(opened) == ["a.wav", "b.wav", "c.wav"]
    opened.clear()
    again = build(folder, cache=cache)
    assert opened == [] and again.fingerprint == first.fingerprint

    write(folder / "b.wav", 3.0)
    write(folder / "d.wav")
    (folder / "c.wav").unlink()
    changed = build(folder, cache=cache)
    assert sorted(opened) == ["b.wav", "d.wav"]
    assert [item.id for item in changed] == ["a.wav", "b.wav", "d.wav"] and changed[1].seconds == 3.0
    opened.clear()
    build(folder, cache=cache, min_seconds=0.2)  # thresholds need no new scan
    assert opened == []
    build(folder, cache=cache, silence_db=-60)  # but silence was not looked at yet
    assert len(opened) == 3
    opened.clear()
    build(folder, cache=cache, silence_db=-40)
    assert opened == []


def test_unreadable_is_not_remembered_and_a_damaged_cache_is_rebuilt(tmp_path, caplog):
    cache = tmp_path / "cache.csv"
    good, bad = write(tmp_path / "d" / "a.wav"), tmp_path / "d" / "b.wav"
    content = good.read_bytes()
    bad.write_bytes(b"\0" * len(content))
    stamp = bad.stat().st_mtime_ns
    assert build(tmp_path / "d", cache=cache).report.unreadable == 1
    bad.write_bytes(content)
    os.utime(bad, ns=(stamp, stamp))  # as if a disk had come back: same size, same time
    assert len(build(tmp_path / "d", cache=cache)) == 2
    cache.write_text('{"version": 2}\nnot,a,cache\n')
    assert len(build(tmp_path / "d", cache=cache)) == 2
    assert "not readable" in caplog.text


def test_default_cache_is_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    write(tmp_path / "d" / "a.wav")
    build(tmp_path / "d", cache=None)
    assert len(list((tmp_path / "home" / "s3prl_speaker_upstreams" / "manifests").glob("*.csv"))) == 1


def test_round_trip_and_fingerprint(tmp_path):
    for root in ("one", "two"):
        write(tmp_path / root / "ann" / "1.wav", 2.0)
        write(tmp_path / root / "bob" / "2, with comma.wav")
    one, two = build(tmp_path / "one"), build(tmp_path / "two")
    assert one.fingerprint == two.fingerprint  # where the data is does not matter
    read = Manifest.read(one.write(tmp_path / "m.csv"))
    assert list(read) == list(one) and read.fingerprint == one.fingerprint
    assert list(build(tmp_path / "m.csv")) == list(one)
    assert one.fingerprint != build(tmp_path / "one", layout="none").fingerprint
    with pytest.raises(ConfigError, match="expected.*'sample_rate'"):
        (tmp_path / "other.csv").write_text("a,b\n1,2\n")
        Manifest.read(tmp_path / "other.csv")


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    manifest = Manifest(["a"], [16000], [16000])
    target = manifest.write(tmp_path / "m.csv")
    old = target.read_text()

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        Manifest(["b"], [1], [1]).write(target)
    assert target.read_text() == old and list(tmp_path.iterdir()) == [target]


def test_split_speakers_is_disjoint_and_complete():
    names = [f"s{i % 7}" for i in range(35)]
    manifest = Manifest([f"u{i}" for i in range(35)], [16000] * 35, [16000] * 35, names)
    rest, out = manifest.split_speakers(2, seed=3)
    assert len(out.speakers) == 2 and len(rest.speakers) == 5 and not set(out.speakers) & set(rest.speakers)
    assert {item.id for item in rest} | {item.id for item in out} == {item.id for item in manifest}
    assert out.labels.max() == 1
    with pytest.raises(ConfigError, match="hold out 7 of 7"):
        manifest.split_speakers(7)


def test_cut_off_files_and_absurd_rates_are_unusable_counted_and_named(tmp_path):
    good = write(tmp_path / "ann" / "a.wav", 2.0)
    (tmp_path / "ann" / "half.wav").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    slow = bytearray(good.read_bytes())
    slow[24:28] = (1).to_bytes(4, "little")  # the header says 1 Hz: "an hour of speech"
    (tmp_path / "ann" / "slow.wav").write_bytes(slow)
    for silence_db in (None, -60):
        found = build(tmp_path, silence_db=silence_db)
        assert [item.id for item in found] == ["ann/a.wav"] and found.seconds == 2.0
        assert found.report.unreadable == 2
        assert "half.wav (got" in str(found.report) and "sample rate of 1 Hz" in str(found.report)


def test_other_kinds_are_read_or_counted_and_hidden_files_left(tmp_path):
    tone = np.random.default_rng(0).normal(0, 0.1, 32000)
    (tmp_path / "ann").mkdir()
    for suffix, kind in ((".mp3", "MP3"), (".aiff", "AIFF"), (".sph", "NIST"), (".opus", "OGG")):
        options = {"subtype": "OPUS"} if suffix == ".opus" else {}
        soundfile.write(tmp_path / "ann" / f"a{suffix}", tone, 16000, format=kind, **options)
    for name in ("b.m4a", "c.m4a", "d.wma", "._a.wav"):
        (tmp_path / "ann" / name).write_bytes(b"?")
    found = build(tmp_path)
    assert sorted(Path(item.id).suffix for item in found) == [".aiff", ".mp3", ".opus", ".sph"]
    assert found.report.unsupported == {".m4a": 2, ".wma": 1}
    assert "3 of a kind that cannot be read (2 .m4a, 1 .wma)" in str(found.report)


def test_stereo_is_silent_where_its_mean_is(tmp_path):
    wav = np.random.default_rng(0).normal(0, 0.1, 32000)
    soundfile.write(tmp_path / "opposed.wav", np.stack([wav, -wav], 1), 16000, subtype="FLOAT")
    write(tmp_path / "a.wav")
    assert build(tmp_path, silence_db=-60).report.silent == 1


def test_several_sources_make_one_manifest_or_are_refused(tmp_path):
    write(tmp_path / "one" / "ann" / "1.wav"), write(tmp_path / "two" / "bob" / "1.wav", 2.0)
    write(tmp_path / "two" / "bob" / "short.wav", 0.1)
    joined = join_manifests([build(tmp_path / "one"), build(tmp_path / "two")], ["one", "two"])
    assert [item.id for item in joined] == ["0/ann/1.wav", "1/bob/1.wav"] and joined.speakers == ["ann", "bob"]
    assert (joined.report.found, joined.report.kept, joined.report.too_short) == (3, 2, 1)
    write(tmp_path / "two" / "ann" / "1.wav")
    with pytest.raises(ConfigError, match="one and two both have a folder 'ann'"):
        join_manifests([build(tmp_path / "one"), build(tmp_path / "two")], ["one", "two"])
    (tmp_path / "list.txt").write_text("x one/ann/1.wav\nx two/bob/1.wav\ny two/ann/1.wav\n")
    with pytest.raises(ConfigError, match="two speakers, 'ann' and 'x'"):
        join_manifests([build(tmp_path / "one"), build(tmp_path / "list.txt")], ["one", "list"])


def test_the_largest_speakers_are_told():
    names = [f"s{n}" for n in range(8) for _ in range(n + 1)]
    manifest = Manifest([str(i) for i in range(len(names))], [1] * len(names), [1] * len(names), names)
    assert manifest.describe_speakers() == "8 speakers, most recordings: s7 8, s6 7, s5 6, s4 5, s3 4"
    assert Manifest(["a"], [1], [1]).describe_speakers() == "0 speakers; 1 recordings of unknown speakers"
    report = ScanReport(found=1)
    report.add(ScanReport(found=2, unsupported={".m4a": 1}))
    assert report.found == 3 and report.unsupported == {".m4a": 1}


def test_ids_are_unique():
    with pytest.raises(ConfigError, match="'a' is listed twice"):
        Manifest(["a", "b", "a"], [1, 1, 1], [1, 1, 1])


def test_real_folders(speech):
    found = build(speech / "digits", min_seconds=0.1)
    assert len(found) == 2400 and len(found.speakers) == 6 and found.report.kept == found.report.found
    assert not build(speech / "commands").labelled
