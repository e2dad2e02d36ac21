"""Bad corpora: a clear error that names the file and the remedy, before any training."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import soundfile

from s3prl_speaker_upstreams.superb.checks import audio_problem, check_corpus
from s3prl_speaker_upstreams.superb.errors import CorpusError
from s3prl_speaker_upstreams.superb.prepare import prepare
from s3prl_speaker_upstreams.superb.tasks import TASKS
from s3prl_speaker_upstreams.superb.tasks.asr import LETTERS
from s3prl_speaker_upstreams.superb.tasks.pr import PHONES
from s3prl_speaker_upstreams.superb.tasks.sf import CHARACTERS


@pytest.fixture()
def copy(generated, tmp_path):
    return lambda task: shutil.copytree(generated(task), tmp_path / task)


@pytest.mark.parametrize("task", TASKS)
def test_wrong_root_names_the_corpus_to_get(task, tmp_path):
    with pytest.raises(CorpusError, match="no such folder") as error:
        check_corpus(TASKS[task], tmp_path / "nowhere")
    assert TASKS[task].corpus in str(error.value)
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(CorpusError, match="it holds holiday.jpg") as error:
        check_corpus(TASKS[task], tmp_path)
    assert TASKS[task].corpus in str(error.value)


MISSING = {
    "PR": "dev-clean",
    "ASR": "test-clean",
    "KS": "test",
    "QbE": "scoring/language_key_eval.lst",
    "SID": "test/wav",
    "ASV": "dev/wav",
    "SD": "dev",
    "IC": "data/valid_data.csv",
    "SF": "valid",
    "ER": "Session3",
    "SE": "noisy_testset_wav_16k",
    "SS": "wav16k/min/dev",
}


@pytest.mark.parametrize("task", TASKS)
def test_missing_split_is_named(task, copy):
    root = copy(task)
    gone = root / MISSING[task]
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(CorpusError, match=gone.name):
        check_corpus(TASKS[task], root)


@pytest.mark.parametrize("task", TASKS)
def test_one_truncated_file_among_good_ones_is_found(task, copy):
    root = copy(task)
    if task == "SD":  # its wav.scp holds absolute paths: make them those of the copy
        for part in ("train", "dev", "test"):
            rows = [f"{p.stem} {p}\n" for p in sorted((root / part / "wav").glob("*.wav"))]
            (root / part / "wav.scp").write_text("".join(rows))
    files = sorted(p for p in root.rglob("*") if p.suffix in (".wav", ".flac") and "99999" not in p.name)
    victim = files[len(files) // 2]
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    with pytest.raises(CorpusError, match=f"{victim.name} .*(was cut off|cannot be)") as error:
        check_corpus(TASKS[task], root)
    assert str(error.value).startswith("1 of ")


@pytest.mark.parametrize("task", ["PR", "SID", "IC", "SF", "SD"])
def test_wrong_sample_rate_is_found_where_s3prl_would_not_resample(task, copy):
    root = copy(task)
    if task == "SD":
        rows = [f"{p.stem} {p}\n" for p in sorted((root / "dev" / "wav").glob("*.wav"))]
        (root / "dev" / "wav.scp").write_text("".join(rows))
    files = sorted(p for p in root.rglob("*") if p.suffix in (".wav", ".flac"))
    victim = next(p for p in files if "dev" in str(p.relative_to(root)) or task in ("IC", "SF"))
    soundfile.write(str(victim), np.zeros(16000), 8000)
    with pytest.raises(CorpusError, match="sample rate of 8000 Hz, expected 16000 Hz"):
        check_corpus(TASKS[task], root)


def test_other_rates_are_accepted_where_s3prl_resamples(copy):
    root = copy("KS")
    soundfile.write(str(next((root / "test" / "yes").glob("*.wav"))), np.zeros(8000), 8000)
    check_corpus(TASKS["KS"], root)


def test_audio_problem_tells_kinds_apart(tmp_path):
    good, empty, text = tmp_path / "good.wav", tmp_path / "empty.wav", tmp_path / "text.wav"
    soundfile.write(str(good), np.zeros(3200), 16000)
    soundfile.write(str(empty), np.zeros(0), 16000)
    text.write_text("this is no audio")
    assert audio_problem(good) == ("", 0.2)
    assert audio_problem(empty)[0] == "holds no samples; copy or extract the file again"
    assert audio_problem(text)[0].startswith("cannot be read")
    streamed = tmp_path / "streamed.wav"  # length 0xFFFFFFFF: written to a pipe, and whole
    data = bytearray(good.read_bytes())
    data[data.index(b"data") + 4 : data.index(b"data") + 8] = b"\xff\xff\xff\xff"
    streamed.write_bytes(data)
    assert audio_problem(streamed)[0] == ""


def test_many_bad_files_are_counted_but_few_are_named(copy):
    root = copy("KS")
    for path in (root / "train" / "yes").glob("*.wav"):
        path.write_bytes(b"")
    for path in (root / "train" / "no").glob("*.wav"):
        path.write_bytes(b"")
    with pytest.raises(CorpusError, match=r"^10 of .* and 5 more"):
        check_corpus(TASKS["KS"], root)


def test_contents_that_would_fail_late_are_found_early(copy):
    root = copy("PR")
    (next(root.rglob("*.trans.txt"))).write_text("")
    with pytest.raises(CorpusError, match="no transcript of"):
        check_corpus(TASKS["PR"], root)
    root = copy("IC")
    table = root / "data" / "test_data.csv"
    table.write_text(table.read_text().replace("increase", "explode"))
    with pytest.raises(CorpusError, match="action 'explode' is not in train_data.csv"):
        check_corpus(TASKS["IC"], root)
    root = copy("SID")
    (root / "dev" / "wav" / "id10001").rename(root / "dev" / "wav" / "john")
    with pytest.raises(CorpusError, match="'john'.*id10001 to id11251"):
        check_corpus(TASKS["SID"], root)


# ---------------------------------------------------------------------------------------------- odd trees


def _hide_files(root) -> int:
    """Put an AppleDouble file beside each recording and each text, as macOS does on foreign file systems."""
    files = [path for path in root.rglob("*") if path.is_file()]
    for path in files:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7" + b"\0" * 78)
    return len(files)


def _seen_by_s3prl(task, data, prepared):
    """Recordings that s3prl's own walk through what it is given would find."""
    import os

    where = prepared / "corpus" if (prepared / "corpus").is_dir() else data
    return {
        os.path.realpath(os.path.join(folder, name))  # os.walk, like rglob and librosa, follows no links to folders
        for folder, _, names in os.walk(where)
        for name in names
        if name.endswith((".wav", ".flac"))
    }


@pytest.mark.parametrize("task", [name for name in TASKS if name != "SD"])  # whose wav.scp holds absolute paths
def test_hidden_files_are_no_recordings(task, copy, tmp_path):
    root = copy(task)
    whole = check_corpus(TASKS[task], root)
    before = prepare(TASKS[task], root, tmp_path / "before")
    texts = {p.relative_to(before): p.read_bytes() for p in before.rglob("*") if p.is_file() and p.name != ".whole"}
    assert _hide_files(root)
    assert check_corpus(TASKS[task], root).counts == whole.counts
    after = prepare(TASKS[task], root, tmp_path / "after")
    for name, text in texts.items():
        assert (after / name).read_bytes() == text, name
    if TASKS[task].walks:
        seen = _seen_by_s3prl(task, root, after)
        assert not [path for path in seen if "/._" in path]
        assert {str(path.resolve()) for path in TASKS[task].layout(root).recordings} <= seen


@pytest.mark.parametrize(
    ("task", "linked"),
    [
        ("SID", "dev/wav/id10001"),
        ("ASV", "dev/wav/id10001"),
        ("PR", "train-clean-100/1000"),
        ("ASR", "train-clean-100/1000"),
        ("KS", "train/yes"),
        ("ER", "Session2/sentences/wav/Ses02F_impro01"),
        ("IC", "wavs/speakers"),
        ("SF", "train"),
        ("SE", "noisy_testset_wav_16k"),
        ("SS", "wav16k/min/dev"),
    ],
)
def test_linked_folders_count_and_reach_s3prl(task, linked, copy, tmp_path):
    root = copy(task)
    whole = check_corpus(TASKS[task], root)
    (root / linked).rename(tmp_path / "elsewhere")
    (root / linked).symlink_to(tmp_path / "elsewhere")
    assert check_corpus(TASKS[task], root).counts == whole.counts
    prepared = prepare(TASKS[task], root, tmp_path / "p")
    if TASKS[task].walks:
        seen = _seen_by_s3prl(task, root, prepared)
        recordings = {str(path.resolve()) for path in TASKS[task].layout(root).recordings}
        assert recordings <= seen
        assert any("elsewhere" in path for path in recordings)


# ---------------------------------------------------------------------------------------------- prepared files


def test_vocabularies_have_the_sizes_of_the_benchmark():
    assert len(PHONES) == 71 and PHONES[:3] == ("SIL", "SPN", "AA0") and PHONES[-1] == "ZH"
    assert len(CHARACTERS) == 28 and len(set(LETTERS)) == 28 and LETTERS[0] == "|"


def test_pr_without_lexicon_says_where_it_lies(copy, tmp_path):
    root = copy("PR")
    shutil.rmtree(root / "lexicon")
    with pytest.raises(CorpusError, match="librispeech-lexicon-200k-g2p.txt.*--s3prl-root"):
        prepare(TASKS["PR"], root, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_pr_words_and_phones_must_be_known(copy, tmp_path):
    root = copy("PR")
    lexicon = root / "lexicon" / "smoke-lexicon.txt"
    text = lexicon.read_text()
    lexicon.write_text(text.replace("K AE1 T", "K QQ T"))
    with pytest.raises(CorpusError, match=r"unknown \['QQ'\]"):
        prepare(TASKS["PR"], root, tmp_path / "p")
    lexicon.write_text("".join(line for line in text.splitlines(True) if not line.startswith(("CAT", "THE", "A\t"))))
    with pytest.raises(CorpusError, match="is in no lexicon"):
        prepare(TASKS["PR"], root, tmp_path / "p")


def test_lists_of_a_checkout_are_used_where_the_corpus_has_none(copy, tmp_path):
    root = copy("SID")
    shipped = tmp_path / "checkout" / "s3prl" / "downstream" / "voxceleb1" / "veri_test_class.txt"
    shipped.parent.mkdir(parents=True)
    shipped.write_bytes((root / "veri_test_class.txt").read_bytes())
    (root / "veri_test_class.txt").unlink()
    with pytest.raises(CorpusError, match="iden_split.txt"):
        prepare(TASKS["SID"], root, tmp_path / "p")
    prepare(TASKS["SID"], root, tmp_path / "p", tmp_path / "checkout")
    assert (tmp_path / "p" / "veri_test_class.txt").read_bytes() == shipped.read_bytes()


@pytest.mark.parametrize("line", ["4 id10001/v0000/00001.wav", "1 id10001/v0000/77777.wav", "nonsense"])
def test_bad_lines_of_the_identification_list_are_found(line, copy, tmp_path):
    root = copy("SID")
    with open(root / "veri_test_class.txt", "a") as file:
        file.write(line + "\n")
    with pytest.raises(CorpusError, match=r"veri_test_class.txt:\d+"):
        prepare(TASKS["SID"], root, tmp_path / "p")


def test_trials_need_both_kinds(copy, tmp_path):
    root = copy("ASV")
    lines = (root / "voxceleb1_test_v2.txt").read_text().splitlines(True)
    (root / "voxceleb1_test_v2.txt").write_text("".join(line for line in lines if line[0] == "1"))
    with pytest.raises(CorpusError, match="EER needs both kinds"):
        prepare(TASKS["ASV"], root, tmp_path / "p")


def test_folds_of_er_hold_each_utterance_once_as_test(generated, tmp_path):
    import json

    out = prepare(TASKS["ER"], generated("ER"), tmp_path / "p")
    tested = []
    for session in range(1, 6):
        folder = out / "meta_data" / f"Session{session}"
        test, train = (json.loads((folder / f"{p}_meta_data.json").read_text())["meta_data"] for p in ("test", "train"))
        assert not {e["path"] for e in test} & {e["path"] for e in train}
        assert all(e["path"].startswith(f"Session{session}/") for e in test)
        tested += [e["path"] for e in test]
    assert len(tested) == len(set(tested)) == 20


def test_dev_speakers_of_se_are_those_of_the_benchmark(generated, tmp_path):
    out = prepare(TASKS["SE"], generated("SE"), tmp_path / "p")
    names = {
        part: {line.split()[0][:4] for line in (out / part / "clean" / "wav.scp").read_text().splitlines()}
        for part in ("train", "dev")
    }
    assert names["dev"] == {"p226", "p287"} and not names["train"] & names["dev"]
