"""Trial lists, whole: cohorts, lists in place of folders, missing recordings, several processes, the command."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from s3prl_speaker_upstreams import cli
from s3prl_speaker_upstreams.checkpoints import save_native, untrained
from s3prl_speaker_upstreams.data.manifest import build_manifest
from s3prl_speaker_upstreams.errors import BadAudio, ConfigError
from s3prl_speaker_upstreams.verification.embedding import embed_files, embed_with
from s3prl_speaker_upstreams.verification.evaluate import choose_cohort, find_recordings, verification, verify
from s3prl_speaker_upstreams.verification.parallel import Ranks
from s3prl_speaker_upstreams.verification.trials import Trials

SPEAKERS = ("ann", "bob", "cas", "dan")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """wav/<speaker>/<n>.wav, cohort/..., trials.txt: a speaker is a level."""
    root = tmp_path_factory.mktemp("corpus")
    for part, count in (("wav", 4), ("cohort", 3)):
        for number, speaker in enumerate(SPEAKERS):
            for clip in range(count):
                path = root / part / f"{part[0]}{speaker}" / f"{clip}.wav"
                path.parent.mkdir(parents=True, exist_ok=True)
                rng = np.random.default_rng(100 * number + clip)
                soundfile.write(path, rng.normal(0, 0.02 * (number + 1), 8000), 16000)
    names = [f"w{speaker}/{clip}.wav" for speaker in SPEAKERS for clip in range(4)]
    lines = [f"{int(a.split('/')[0] == b.split('/')[0])} {a} {b}" for i, a in enumerate(names) for b in names[i + 1 :]]
    (root / "trials.txt").write_text("\n".join(lines) + "\n")
    return root


def level(wavs: list[np.ndarray]) -> np.ndarray:
    return np.array([[1.0, 50 * wav.std(), wav.mean()] for wav in wavs])


def test_a_cohort_may_be_a_folder_a_list_or_a_manifest(corpus):
    manifest = build_manifest(corpus / "cohort", min_seconds=0.1, cache=False, progress=False)
    given = verification(level, corpus / "trials.txt", corpus / "wav", cohort=manifest, top_n=2, progress=False)
    assert {"eer", "mean_eer", "asnorm_eer"} <= given.keys()
    manifest.write(corpus / "cohort.csv")
    listed = verification(
        level, corpus / "trials.txt", corpus / "wav", cohort=corpus / "cohort.csv", top_n=2, progress=False
    )
    assert listed == given
    folder = verification(
        level, corpus / "trials.txt", corpus / "wav", cohort=corpus / "cohort", cohort_layout="none", top_n=2,
        progress=False,
    )  # fmt: skip
    assert folder["mean_eer"] == given["mean_eer"] and folder["eer"] == given["eer"]


def test_the_mean_is_that_of_the_cohort(corpus):
    """A large common offset hides the speakers from plain cosine; after subtraction they are apart."""
    manifest = build_manifest(corpus / "cohort", min_seconds=0.1, cache=False, progress=False)
    two = Trials(np.array([1, 0]), ("wann/0.wav", "wann/0.wav"), ("wann/1.wav", "wdan/1.wav"))
    outcome = verify(
        lambda wavs: level(wavs) + [0, 1000, 0], two, corpus / "wav", cohort=manifest, top_n=4, progress=False
    )
    assert outcome.scores["cosine"][0] - outcome.scores["cosine"][1] < 1e-3
    assert outcome.scores["mean"][0] > 0.9 and outcome.scores["mean"][1] < -0.5


def test_cohort_is_spread_over_speakers(corpus):
    manifest = build_manifest(corpus / "cohort", min_seconds=0.1, cache=False, progress=False)
    for count in (4, 8, 12):
        chosen = choose_cohort(manifest, count)
        assert np.bincount(manifest.labels[chosen]).tolist() == [count // 4] * 4
    assert choose_cohort(manifest, 4, seed=1).tolist() != choose_cohort(manifest, 4, seed=2).tolist()
    assert len(choose_cohort(manifest, 500)) == 12


def test_labels_that_are_inverted_are_said(corpus, caplog):
    trials = Trials(np.array([0, 1] * 3), ("wann/0.wav",) * 6, ("wann/1.wav", "wdan/1.wav") * 3)
    outcome = verify(level, trials, corpus / "wav", progress=False)
    assert outcome.numbers["eer"] == 1.0 and "perhaps inverted" in outcome.notes[0] and "inverted" in caplog.text


def test_a_list_says_where_recordings_are(corpus, tmp_path):
    (tmp_path / "wav.scp").write_text("".join(f"u{i} {corpus}/wav/w{s}/0.wav\n" for i, s in enumerate(SPEAKERS)))
    trials = Trials(np.array([1, 0]), ("u0", "u1"), ("u0", "u3"))
    assert [Path(p).parent.name for p in find_recordings(trials, tmp_path / "wav.scp")] == ["wann", "wbob", "wdan"]
    with pytest.raises(ConfigError, match="u9: not in .*wav.scp .1 of 2"):
        find_recordings(Trials(np.array([1]), ("u0",), ("u9",)), tmp_path / "wav.scp")


def test_missing_and_damaged_recordings_are_named_or_left_out(corpus, tmp_path):
    for name in ("a", "b", "c"):
        soundfile.write(tmp_path / f"{name}.wav", np.random.default_rng(0).normal(0, 0.1, 8000), 16000)
    (tmp_path / "half.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:5000])
    trials = Trials(np.array([1, 0, 1, 0]), ("a", "a", "half", "a"), ("b", "c", "b", "gone"))
    with pytest.raises(ConfigError, match="gone: no such recording .1 of 5"):
        verify(level, trials, tmp_path, progress=False)
    with pytest.raises(BadAudio, match="half.wav"):
        verify(level, Trials(trials.labels[:3], trials.enrol[:3], trials.test[:3]), tmp_path, progress=False)
    outcome = verify(level, trials, tmp_path, skip_unusable=True, progress=False)
    assert len(outcome.trials) == 2 and outcome.numbers["trials"] == 2
    assert "2 recordings are missing or unusable and 2 of 4 trials left out" in outcome.notes[0]
    assert "half.wav" in outcome.notes[0] and "gone" in outcome.notes[0]


# ---------------------------------------------------------------------------------------------- several processes
def in_turn(paths: list[str], size: int, embed=level, **options) -> list:
    """Every process of ``size``, in threads that meet as processes do."""
    import threading

    barrier, table, out = threading.Barrier(size), [None] * size, [None] * size

    def gather(rank):
        def call(value):
            table[rank] = value
            barrier.wait(timeout=20)
            values = list(table)
            barrier.wait(timeout=20)
            return values

        return call

    def work(rank):
        try:
            ranks = Ranks(rank, size, gather(rank), sync_seconds=0.01)
            out[rank] = embed_files(embed, paths, ranks=ranks, batch_seconds=0.5, **options)
        except Exception as error:
            out[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    return out


@pytest.mark.parametrize("size", [2, 3, 20])
def test_processes_that_share_get_what_one_gets(corpus, size):
    paths = [str(p) for p in sorted((corpus / "wav").rglob("*.wav"))]
    alone = embed_files(level, paths)
    for rows in in_turn(paths, size):
        np.testing.assert_array_equal(rows, alone)


def test_what_fails_in_one_process_ends_all(corpus, tmp_path):
    paths = [str(p) for p in sorted((corpus / "wav").rglob("*.wav"))]
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    first, second = in_turn([*paths, str(tmp_path / "bad.wav")], 2)
    assert isinstance(first, BadAudio) and isinstance(second, ConfigError) and "process 0 of 2 failed" in str(second)
    skipped: dict[str, str] = {}
    first, second = in_turn([*paths, str(tmp_path / "bad.wav")], 2, skip=skipped)
    assert list(skipped) == [str(tmp_path / "bad.wav")] and np.isnan(first[-1]).all() and np.isnan(second[-1]).all()


def test_a_slow_process_does_not_run_into_the_time_out(corpus, tmp_path):
    """Process 1 needs 4.8 s for its recordings, the group's time-out is 2 s: they meet in between."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import datetime, functools, json, sys, time
            import numpy as np, torch.distributed as dist
            import s3prl_speaker_upstreams.verification.evaluate as module
            from s3prl_speaker_upstreams.verification.parallel import Ranks
            rank = int(sys.argv[1])
            store = dist.FileStore("{tmp_path}/meet", 2)
            store.set(str(rank), "here")
            store.wait(["0", "1"], datetime.timedelta(seconds=120))
            dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=2))
            module.embed_files = functools.partial(module.embed_files, batch_seconds=0.1)

            def embed(wavs):
                time.sleep(0.6 * rank)
                return np.array([[1.0, 50 * wav.std(), wav.mean()] for wav in wavs])

            for seconds in (0.3, 60):
                ranks = Ranks.current(sync_seconds=seconds)
                try:
                    result = module.verification(
                        embed, "{corpus}/trials.txt", "{corpus}/wav", ranks=ranks, progress=False
                    )
                    print(json.dumps(result), flush=True)
                except Exception as error:
                    print(json.dumps(type(error).__name__), flush=True)
                    break
            """
        )
    )
    both = [
        subprocess.Popen([sys.executable, str(script), str(rank)], stdout=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    try:
        outs = [process.communicate(timeout=180)[0].splitlines() for process in both]
    finally:
        for process in both:
            process.kill()
    alone = verification(level, corpus / "trials.txt", corpus / "wav", progress=False)
    assert [json.loads(out[0]) for out in outs] == [alone, alone]
    assert json.loads(outs[0][1]) in ("RuntimeError", "DistBackendError")  # without meeting: what this is about


# ---------------------------------------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("net")
    torch.manual_seed(0)
    tiny = untrained(channels=16, mfa_channels=24, embedding_dim=8, se_channels=4, attention_channels=4)
    return save_native(tiny, folder / "tiny.safetensors")


def test_the_command_with_everything(corpus, checkpoint, tmp_path, capsys):
    options = ["--root", str(corpus / "wav"), "--cohort", str(corpus / "cohort.csv"), "--top-n", "3"]
    build_manifest(corpus / "cohort", min_seconds=0.1, cache=False, progress=False).write(corpus / "cohort.csv")
    out, scores = tmp_path / "result.json", tmp_path / "scores.tsv"
    command = ["evaluate", str(checkpoint), str(corpus / "trials.txt"), *options]
    assert cli.main([*command, "--out", str(out), "--scores", str(scores), "--intervals", "20"]) == 0
    result = json.loads(out.read_text())
    assert result["trials"] == str(corpus / "trials.txt") and (result["n_trials"], result["n_targets"]) == (120, 24)
    assert result["interval_by"] == "speakers, by name" and result["eer_low"] <= result["eer"] <= result["eer_high"]
    assert {"mean_eer", "asnorm_eer", "asnorm_min_dcf_0.01"} <= result.keys() and result["made_by"]["versions"]
    assert "95 %, by speakers, by name" in capsys.readouterr().err
    assert scores.read_text().splitlines()[0] == "label\tenrol\ttest\tcosine\tmean\tasnorm"
    assert len(scores.read_text().splitlines()) == 121
    assert cli.main([*command, "--out", str(out), "--calibrate", str(scores), "--intervals", "0"]) == 0
    result = json.loads(out.read_text())
    assert 0 <= result["min_cllr"] <= result["cllr"] <= 1 + 1e-6 and "asnorm_act_dcf_0.01" in result
    assert result["act_dcf_0.05"] >= result["min_dcf_0.05"] - 1e-9


def test_the_command_takes_public_names_and_says_what_is_wrong(corpus, capsys):
    command = ["evaluate", "ecapa_dino_small", str(corpus / "trials.txt"), "--root", str(corpus / "wav")]
    assert cli.main([*command, "--intervals", "0"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    from s3prl_speaker_upstreams.checkpoints import load_encoder
    from s3prl_speaker_upstreams.weights import resolve

    direct = verification(
        embed_with(load_encoder(resolve("ecapa_dino_small"))), corpus / "trials.txt", corpus / "wav", progress=False
    )
    assert numbers["eer"] == direct["eer"] and numbers["min_dcf_0.01"] == direct["min_dcf_0.01"]
    for words, message in (
        (["evaluate", "ecapa_dino_smal", str(corpus / "trials.txt")], "ecapa_dino_small"),
        (["evaluate", "ecapa_dino_small", str(corpus / "nothing.txt")], "there is no"),
        ([*command, "--cohort", "nowhere"], "--cohort: there is no nowhere"),
        ([*command, "--device", "cuda:7"], "use cpu"),
        ([*command, "--format", "nonsense"], "nonsense"),
    ):
        assert cli.main(words) == 1
        assert message in capsys.readouterr().err
