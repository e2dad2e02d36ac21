"""Label files: every format gives the same segments; names are matched by one rule; what is wrong is named."""

import pytest

from cka_addon.probe.errors import LabelError
from cka_addon.probe.labels import Segment, match_names, parse_label, read_labels, read_textgrid, speakers_of

TRUTH = [Segment(0.0, 0.25, "h#"), Segment(0.25, 0.5, 'a "b"'), Segment(0.5, 1.0, "c 3 [2]")]
LONG = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 1
tiers? <exists>
size = 3
item []:
    item [1]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 1
        intervals: size = 4
        intervals [1]:
            xmin = 0
            xmax = 0.25
            text = "h#"
        intervals [2]:
            xmin = 0.25
            xmax = 0.5
            text = "a ""b""\"
        intervals [3]:
            xmin = 0.5
            xmax = 1
            text = "c 3 [2]"
        intervals [4]:
            xmin = 1
            xmax = 1
            text = ""
    item [2]:
        class = "TextTier"
        name = "clicks"
        xmin = 0
        xmax = 1
        points: size = 1
        points [1]:
            number = 0.5
            mark = "x"
    item [3]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 1
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 1
            text = "all"
"""
SHORT = """File type = "ooTextFile"
Object class = "TextGrid"

0
1
<exists>
1
"IntervalTier"
"phones"
0
1
3
0
0.25
"h#"
0.25
0.5
"a ""b""\"
0.5
1
"c 3 [2]"
"""


def test_textgrids_long_and_short_hold_the_same(tmp_path):
    (tmp_path / "long.TextGrid").write_text(LONG, encoding="utf-16")
    (tmp_path / "short.TextGrid").write_text(SHORT)
    assert read_textgrid(tmp_path / "long.TextGrid", "phones") == TRUTH
    assert read_textgrid(tmp_path / "short.TextGrid") == TRUTH
    with pytest.raises(LabelError, match="phones, words.*point tiers.*clicks"):
        read_textgrid(tmp_path / "long.TextGrid", "clicks")
    (tmp_path / "cut.TextGrid").write_text(SHORT[: SHORT.index("0.25\n0.5")])
    with pytest.raises(LabelError, match="whole TextGrid"):
        read_textgrid(tmp_path / "cut.TextGrid", "phones")


def test_timed_formats_agree(tmp_path):
    truth = [Segment(0.0, 0.25, "a"), Segment(0.25, 1.0, "b")]
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "u.phn").write_text("0 4000 a\n4000 16000 b\n")
    (tmp_path / "t" / "u.wrd").write_text("0 16000 word\n")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "u.lab").write_text("signal u\nnfields 1\n#\n 0.25 125 a\n 1.0 125 b\n")
    (tmp_path / "p.ctm").write_text(";; comment\nu 1 0.0 0.25 a\nu 1 0.25 0.75 b 0.99\n")
    (tmp_path / "s.csv").write_text("utt;start;end;phone\nu;0;0.25;a\nu;0.25;1;b\n")
    (tmp_path / "d.rttm").write_text(
        "SPEAKER u 1 0.0 0.25 <NA> <NA> a <NA> <NA>\nSPEAKER u 1 0.25 0.75 <NA> <NA> b <NA>\n"
    )
    for spec in ("t:phn", "x", "x:lab", "p.ctm", "s.csv:phone", "d.rttm"):
        found = read_labels(f"{tmp_path}/{spec}")
        assert (found.segments, found.unit, found.kind) == ({"u": truth}, "segment", "class"), spec
    with pytest.raises(LabelError, match=r"\.phn, \.wrd"):
        read_labels(f"{tmp_path}/t")


def test_columns_numbers_and_kaldi(tmp_path):
    table = tmp_path / "l.tsv"
    rows = "".join(f"u{i}\ts{i % 3}\t{20 + i}\t\n" for i in range(12))
    table.write_text("\ufeffutterance\tspeaker\tage\tnote\n" + rows, encoding="utf-8")
    assert read_labels(f"{table}:speaker").utterances["u4"] == "s1"
    assert read_labels(f"{table}:age").kind == "number" and read_labels(f"{table}:age", kind="class").kind == "class"
    assert read_labels(f"{table}:speaker@frame").unit == "frame"
    with pytest.raises(LabelError, match="holds no label"):
        read_labels(f"{table}:note")
    with pytest.raises(LabelError, match="speaker, age, note"):
        read_labels(f"{table}:sex")
    with pytest.raises(LabelError, match="'s0' among numbers"):
        read_labels(f"{table}:speaker", kind="number")
    (tmp_path / "utt2spk").write_text("a anna\nb ben\n")
    assert read_labels(f"{tmp_path}/utt2spk").utterances == {"a": "anna", "b": "ben"}
    (tmp_path / "utt2spk").write_text("a anna\na ben\n")
    with pytest.raises(LabelError, match="utt2spk:2: 'a' has two values"):
        read_labels(f"{tmp_path}/utt2spk")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("u 1 0.5 -0.1 a", "0 <= start"),
        ("u 1 x 1 a", "expected numbers"),
        ("u 1 0 1", "4 fields"),
        ("u 1 nan 1 a", "numbers"),
    ],
)
def test_bad_times_name_the_line(tmp_path, text, problem):
    (tmp_path / "p.ctm").write_text(f"u 1 0 1 a\n{text}\n")
    with pytest.raises(LabelError, match=rf"p\.ctm:2.*{problem}"):
        read_labels(f"{tmp_path}/p.ctm")


def test_names_match_by_one_rule_or_say_how_they_differ():
    assert match_names(["a/x", "b/y"], ["a/x", "b/y"])[1] == "the whole id"
    assert match_names(["./a/x.flac"], ["a/x"])[0] == {"./a/x.flac": "a/x"}
    assert match_names(["x", "y"], ["a/x", "b/x", "a/y"])[0] == {"y": "a/y"}
    with pytest.raises(LabelError, match="labels have 'q1'.*recordings are 'a/x'"):
        match_names(["q1"], ["a/x"])


def test_speakers_by_one_rule():
    assert set(speakers_of(["id10001/v/1", "id10002/v/1"]).values()) == {"id10001", "id10002"}
    assert speakers_of(["vox/id10001/v/1"]) == {"vox/id10001/v/1": "id10001"}
    with pytest.raises(LabelError, match="1 of 2 recordings lie as VoxCeleb"):
        speakers_of(["id10001/v/1", "anna/1"])
    with pytest.raises(LabelError, match="no folder, first 'b'"):
        speakers_of(["anna/1", "b"])


def test_specifications():
    assert parse_label("grids/:phones").column == "phones"
    assert (parse_label("made:channel").source, parse_label("made:channel").name) == ("made", "channel")
    with pytest.raises(LabelError, match="unit 'word'"):
        parse_label("a.ctm@word")
