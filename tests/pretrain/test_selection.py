"""Positives from elsewhere and the options of the loader, in whole runs: logged, resumed exactly, off by default."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from s3prl_speaker_upstreams.errors import ConfigError
from s3prl_speaker_upstreams.pretrain.selection import ClusterSelection

SHORT = ("run.steps=6", "run.batch=12", "run.log_every=1", "run.save_every=3steps")
CLUSTERS = (
    *SHORT,
    "data.positives=clusters",
    "data.clusters=6",
    "data.cluster_start=2steps",
    "data.cluster_every=2steps",
)


def numbers(log, out):
    return [{k: v for k, v in row.items() if k not in ("step_seconds", "waiting")} for row in log(out)]


@pytest.mark.parametrize(("kind", "recording", "session"), [("same_speaker", 0.0, 1.0), ("same_session", 0.0, 1.0)])
def test_where_positives_came_from_is_logged(corpus, make, log, tmp_path, kind, recording, session):
    make(corpus, tmp_path, *SHORT, f"data.positives={kind}").run(stop_after=2)
    row = log(tmp_path)[-1]
    assert row["positives_same_recording"] == recording and row["positives_same_speaker"] == 1.0
    assert row["positives_same_session"] == session  # a folder is a session, and here a speaker too


def test_without_a_selection_nothing_is_logged_and_nothing_differs(corpus, make, log, tmp_path):
    make(corpus, tmp_path / "a", *SHORT).run(stop_after=2)
    make(corpus, tmp_path / "b", *SHORT, "data.view_speeds=[1.0]", "data.augment.mask_p=0").run(stop_after=2)
    assert numbers(log, tmp_path / "a") == numbers(log, tmp_path / "b")
    assert not any(key.startswith("positives") for row in log(tmp_path / "a") for key in row)


def test_clusters_are_made_when_they_are_due_and_a_resumed_run_has_the_same(corpus, make, log, tmp_path):
    made = []
    whole = make(corpus, tmp_path / "whole", *CLUSTERS)
    refresh = ClusterSelection.refresh

    def noted(self, step, *rest):
        made.append(step)
        refresh(self, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClusterSelection, "refresh", noted)
        whole.run()
    assert made == [2, 4]
    rows = log(tmp_path / "whole")
    assert [row["positives_same_recording"] for row in rows[:2]] == [1.0, 1.0]
    assert all(row["positives_same_recording"] < 0.7 for row in rows[2:])  # an utterance alone in its cluster stays
    for stop in (3, 4):
        make(corpus, tmp_path / f"part{stop}", *CLUSTERS).run(stop_after=stop)
        make(corpus, tmp_path / f"part{stop}", *CLUSTERS).run()
        assert numbers(log, tmp_path / f"part{stop}") == numbers(log, tmp_path / "whole")


def test_recordings_that_sound_alike_share_a_cluster(corpus, make, tmp_path):
    trainer = make(corpus, tmp_path, *CLUSTERS)
    trainer.run(stop_after=3)
    positives = trainer.loader.dataset.positives
    labels, clusters = trainer.loader.dataset.manifest.labels, positives.assignments
    same, together = labels[:, None] == labels, clusters[:, None] == clusters
    off = ~np.eye(len(labels), dtype=bool)
    assert together[same & off].mean() > 2 * together[~same].mean()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.positives=clusters"], "data.clusters: got 0"),
        (["data.positives=same_speaker", "method=supervised"], "self-supervised"),
        (["data.view_speeds=[1.0,0.9]", "data.feature_versions=2"], "one speed"),
        (["data.positives=other_session"], "no utterance has another one"),
    ],
)
def test_what_does_not_go_together_is_said_at_the_start(corpus, make, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(corpus, tmp_path, *SHORT, *settings)


def test_every_option_of_the_loader_trains(corpus, make, log, tmp_path):
    options = (
        "data.view_speeds=[1.0,0.9,1.1]", "data.trim_db=40", "data.balance_speakers=true", "data.augment.mask_p=0.5",
        "data.augment.codec_p=0.5", "data.augment.codecs=[ulaw]",
    )  # fmt: skip
    trainer = make(corpus, tmp_path, *SHORT, *options)
    trainer.run(stop_after=3)
    assert len(log(tmp_path)) == 3 and all(np.isfinite(row["loss"]) for row in log(tmp_path))
    batch = next(trainer.loader)
    counts = np.bincount(trainer.loader.dataset.manifest.labels[batch.indices])
    assert counts.tolist() == [1] * 12
    features = trainer.features.of(batch, torch.device("cpu")).features[0]
    assert bool((features == 0).all(2).any())  # some frames are masked


@pytest.mark.e2e
def test_two_processes_share_clusters_and_trials(corpus, tmp_path):
    """Both find the clusters of one process, evaluate together, and end."""
    names = sorted(str(path.relative_to(corpus)) for path in corpus.rglob("*.wav"))[:12]
    lines = [f"{int(a[:5] == b[:5])} {a} {b}" for i, a in enumerate(names) for b in names[i + 1 :]]
    (tmp_path / "trials.txt").write_text("\n".join(lines) + "\n")
    logs = []
    for processes, batch in ((1, 8), (2, 4)):
        out = tmp_path / str(processes)
        launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1", "--standalone"]
        settings = [f"run.batch={batch}", "run.threads=1", "run.steps=6", "run.log_every=1", "eval.every=3steps"]
        settings += ["data.positives=clusters", "data.clusters=4", "data.cluster_start=2steps"]
        settings += ["data.cluster_every=4steps", "data.layout=speaker", "optim.name=sgd", "optim.lr=0.001"]
        command = [sys.executable, *(launch if processes == 2 else []), "-m", "s3prl_speaker_upstreams", "pretrain"]
        command += ["--preset", "smoke", "--data", corpus, "--trials", tmp_path / "trials.txt", "--trials-root", corpus]
        command += ["--out", out, "--set", *settings]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        logs.append([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
    for one, two in zip(*logs, strict=True):
        for key in ("positives_same_recording", "positives_same_speaker", "eer", "mean_eer"):
            assert one.get(key) == (pytest.approx(two[key]) if key in two else None), (key, one, two)
    assert sum("mean_eer" in row for row in logs[1]) == 2 and logs[1][-2]["positives_same_recording"] < 1
