"""Lists: every format tells the same recordings and speakers; no single line changes who speaks in the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from s3prl_speaker_upstreams.data.lists import read_listing
from s3prl_speaker_upstreams.errors import ConfigError

FILES = [f"s{speaker}/{name}" for speaker in range(6) for name in ("1.wav", "2 two.wav")]
SPEAKERS = [name.split("/")[0] for name in FILES]


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Six speakers of two recordings each, one of them with a blank in its name; the files are empty."""
    for name in FILES:
        touch(tmp_path / "corpus" / name)
    return tmp_path / "corpus"


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def told(source, layout="auto") -> tuple[list[str], list[str | None]]:
    listing = read_listing(source, layout)
    return [Path(entry.path).name for entry in listing], [entry.speaker for entry in listing]


NAMES = [name.split("/")[1] for name in FILES]
ROWS = list(zip(FILES, SPEAKERS, strict=True))
FORMATS = {
    "tab.txt": "".join(f"{speaker}\t{name}\n" for name, speaker in ROWS),
    "blank.lst": "".join(f"{speaker} {name}\n" for name, speaker in ROWS),
    "behind.tsv": "# comment\n\n" + "".join(f"{name}\t{speaker}\n" for name, speaker in ROWS),
    "plain.csv": "".join(f"{name},{speaker}\n" for name, speaker in ROWS),
    "speechbrain.csv": "ID,duration,wav,start,stop,spk_id\n"
    + "".join(f"{i},1.5,{name},0,24000,{speaker}\n" for i, (name, speaker) in enumerate(ROWS)),
    "segments.csv": "ID,duration,wav,start,stop,spk_id\n"
    + "".join(f"{i}_{k},1.5,{name},{k},{k + 1},{speaker}\n" for i, (name, speaker) in enumerate(ROWS) for k in (0, 1)),
    "3dspeaker.csv": "ID,dur,path,start,stop,spk\n"
    + "".join(f"{i},1.5,{name},0,1.5,{speaker}\n" for i, (name, speaker) in enumerate(ROWS)),
    "semicolons.csv": "path;speaker\n" + "".join(f"{name};{speaker}\n" for name, speaker in ROWS),
    "quoted.csv": "speaker, path\n" + "".join(f'{speaker}, "{name}"\n' for name, speaker in ROWS),
    "raw.list": "".join(f'{{"key": "u{i}", "wav": "{n}", "spk": "{s}"}}\n' for i, (n, s) in enumerate(ROWS)),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_tells_the_same(corpus, name, encoding):
    (corpus / name).write_text(FORMATS[name], encoding=encoding)
    assert told(corpus / name) == (NAMES, SPEAKERS)
    assert read_listing(corpus / name).layout == "list"


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"segments.csv"}))
def test_both_tools_read_the_same_from_a_list(corpus, name):
    """The analysis has its own thin copy of the rule, to work alone."""
    cka_audio = pytest.importorskip("cka_addon.audio")
    (corpus / name).write_text(FORMATS[name])
    mine = [(entry.path, entry.speaker) for entry in read_listing(corpus / name)]
    theirs = sorted((str(item.path), item.speaker) for item in cka_audio.list_recordings(corpus / name))
    assert theirs == mine


def test_kaldi_folders(corpus):
    kaldi = corpus.parent / "kaldi"
    kaldi.mkdir()
    scp = "".join(f"utt{i} {corpus / name}\n" for i, name in enumerate(FILES))
    (kaldi / "wav.scp").write_text(scp)
    assert told(kaldi) == (NAMES, SPEAKERS)  # by their folders, as of any list that states none
    (kaldi / "utt2spk").write_text("".join(f"utt{i} {speaker}\n" for i, speaker in enumerate(SPEAKERS)))
    for source in (kaldi, kaldi / "wav.scp"):
        assert told(source) == (NAMES, SPEAKERS)
    assert read_listing(kaldi)[3].id == "utt3"
    (kaldi / "utt2spk").write_text("utt0 s0\n")
    with pytest.raises(ConfigError, match="no speaker of 11 of the 12"):
        read_listing(kaldi)
    (kaldi / "wav.scp").write_text("utt0 sox a.wav -t wav - |\n")
    with pytest.raises(ConfigError, match="command"):
        read_listing(kaldi)


def test_names_are_not_speakers(corpus):
    """`id<TAB>path` is the analysis' own format: every utterance a speaker would be nonsense, and is never taken."""
    lines = [f"utt{i}\t{name}" for i, name in enumerate(FILES)]
    (corpus / "ids.txt").write_text("\n".join(lines))
    listing = read_listing(corpus / "ids.txt")
    assert [entry.id for entry in listing] == [f"utt{i}" for i in range(12)] and told(corpus / "ids.txt")[1] == SPEAKERS
    assert told(corpus / "ids.txt", "none")[1] == [None] * 12
    assert len(set(told(corpus / "ids.txt", "list")[1])) == 12  # only where it is asked for by name
    (corpus / "ids.txt").write_text("\n".join(f"utt{i % 11}\t{name}" for i, name in enumerate(FILES)))
    assert read_listing(corpus / "ids.txt").layout == "list"  # a word that comes back names no recording


PATHS = [str(name) for name in FILES]


def write(corpus: Path, lines: list[str], encoding: str = "utf-8") -> Path:
    (corpus / "list.txt").write_text("\n".join(lines) + "\n", encoding=encoding)
    return corpus / "list.txt"


def test_no_single_line_flips_who_speaks(corpus):
    assert told(write(corpus, PATHS)) == (NAMES, SPEAKERS)
    assert told(write(corpus, PATHS, "utf-8-sig"))[1] == SPEAKERS
    for gone in ("gone.wav", "s9/gone.wav", "../elsewhere/deep/gone.wav"):
        listing = read_listing(write(corpus, [*PATHS, gone]))
        assert [entry.speaker for entry in listing] == SPEAKERS and len(listing.missing) == 1
    touch(corpus.parent / "other" / "x.wav")
    with pytest.raises(ConfigError, match="different depths.*data.layout=speaker.*=none"):
        read_listing(write(corpus, [*PATHS, "../other/x.wav", "../other/x.wav"]))
    assert told(write(corpus, [*PATHS, "../other/x.wav"]), "speaker")[1] == [*SPEAKERS, "other"]
    touch(corpus / "stray.wav")
    with pytest.raises(ConfigError, match="stray.wav.*different depths"):
        read_listing(corpus)


def test_mixed_statements_are_refused(corpus):
    with pytest.raises(ConfigError, match="the same on every line"):
        read_listing(write(corpus, ["s0 s0/1.wav", "s1/1.wav"]))
    with pytest.raises(ConfigError, match="same column"):
        read_listing(write(corpus, ["s0\ts0/1.wav", "s1/1.wav\ts1"]))
    (corpus / "a.csv").write_text("path,speaker\ns0/1.wav,s0\ns1/1.wav,\n")
    with pytest.raises(ConfigError, match="1 of 2 lines state a speaker, line 3"):
        read_listing(corpus / "a.csv")
    with pytest.raises(ConfigError, match="two speakers, 'a' .line 1. and 'b' .line 3."):
        read_listing(write(corpus, ["a s0/1.wav", "a s1/1.wav", "b s0/1.wav"]))
    (corpus / "a.csv").write_text("path,speaker\ns0/1.wav,\ns1/1.wav,\n")
    assert told(corpus / "a.csv")[1] == [None, None]  # the list says that nobody is known; folders are not asked
    (corpus / "a.csv").write_text("name,who\ns0/1.wav,x\n")
    with pytest.raises(ConfigError, match="column names of which one is path"):
        read_listing(corpus / "a.csv")


def test_voxceleb_one_and_two_and_librispeech(tmp_path):
    vox = ["vox1/dev/wav/id10001/abc/00001.wav", "vox2/dev/aac/id00012/x-Y_z/00003.flac"]
    for name in vox:
        touch(tmp_path / "vox" / name)
    assert told(tmp_path / "vox")[1] == ["id10001", "id00012"]
    touch(tmp_path / "vox" / "musan" / "speech" / "x.wav")
    with pytest.raises(ConfigError, match="2 of 3 files lie as in voxceleb.*musan/speech/x.wav.*=none"):
        read_listing(tmp_path / "vox")
    assert set(told(tmp_path / "vox", "none")[1]) == {None}
    for name in ("train-clean-100/84/121123/84-121123-0001", "dev-clean/1272/128104/1272-128104-0000"):
        touch(tmp_path / "LibriSpeech" / f"{name}.flac")
    listing = read_listing(tmp_path / "LibriSpeech")
    assert listing.layout == "librispeech" and {entry.speaker for entry in listing} == {"84", "1272"}
    for name in ("train/ann/1.wav", "dev/bob/1.wav"):
        touch(tmp_path / "parts" / name)
    with pytest.raises(ConfigError, match="first folders .dev, train. look like parts"):
        read_listing(tmp_path / "parts")
    assert told(tmp_path / "parts" / "train")[1] == ["ann"]
    assert told(tmp_path / "parts", "speaker")[1] == ["dev", "train"]  # asked for by name


def test_equal_folder_names_are_not_one_speaker(tmp_path):
    for name in ("a/ann/1.wav", "b/ann/1.wav"):
        touch(tmp_path / name)
    with pytest.raises(ConfigError, match="have the same name"):
        read_listing(write(tmp_path, ["a/ann/1.wav", "b/ann/1.wav"]), "speaker")
    with pytest.raises(ConfigError, match="states no speakers, as layout=list"):
        read_listing(write(tmp_path, ["a/ann/1.wav", "b/ann/1.wav"]), "list")


@pytest.mark.parametrize(("text", "encoding"), [("s0/中文.wav\n", "gbk"), ("s0/é.wav\n", "latin-1")])
def test_other_encodings_are_named(corpus, text, encoding):
    (corpus / "list.txt").write_bytes(b"s1/1.wav\n" + text.encode(encoding))
    with pytest.raises(ConfigError, match="list.txt, line 2.*not UTF-8.*iconv"):
        read_listing(corpus / "list.txt")


def test_binary_files_are_no_lists(corpus):
    for data in (b"PK\x03\x04\0\0", "s0/1.wav\n".encode("utf-16-le")):
        (corpus / "list.txt").write_bytes(data)
        with pytest.raises(ConfigError, match="binary data, or UTF-16 without its mark"):
            read_listing(corpus / "list.txt")


def test_relative_paths_begin_in_the_lists_folder_or_where_one_stands(corpus, monkeypatch):
    (corpus.parent / "lists").mkdir()
    place = write(corpus.parent / "lists", [f"corpus/{name}" for name in FILES])
    assert len(read_listing(place).missing) == 12
    monkeypatch.chdir(corpus.parent)
    assert told(place) == (NAMES, SPEAKERS)


def test_kinds_that_cannot_be_read_are_counted(corpus):
    touch(corpus / "s0" / "a.m4a")
    assert read_listing(corpus).unsupported == {".m4a": 1} and len(read_listing(corpus)) == 12
    listing = read_listing(write(corpus, [*PATHS, "s0/a.m4a"]))
    assert listing.unsupported == {".m4a": 1} and told(corpus / "list.txt")[1] == SPEAKERS
    with pytest.raises(ConfigError, match="what stands for it"):
        read_listing(write(corpus, ["$data_root/s0/1.wav"]))
