"""Plots: what is drawn is what was given, and pictures come whole with their numbers."""

from __future__ import annotations

import json

import matplotlib.image
import numpy as np
import pytest
from scipy.special import ndtri

from s3prl_speaker_upstreams.errors import ConfigError
from s3prl_speaker_upstreams.verification.plots import (
    plot_det,
    plot_embeddings,
    plot_scores,
    plot_training,
    project,
    read_log,
    save_plot,
)


@pytest.fixture
def log(tmp_path):
    rows = [{"step": step, "epoch": 0, "loss": 8.0 - step, "name": "x"} for step in range(4)]
    rows.insert(2, {"step": 1, "eer": 0.25})
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_training_curves_of_one_run_and_of_several(log):
    figure, panels = plot_training(log)
    assert [panel.get_title() for panel in panels] == ["loss", "eer"]
    np.testing.assert_array_equal(panels[0].lines[0].get_xydata(), [[0, 8], [1, 7], [2, 6], [3, 5]])
    np.testing.assert_array_equal(panels[1].lines[0].get_xydata(), [[1, 0.25]])
    figure, panels = plot_training({"seed 0": log, "seed 1": [{"step": 5, "loss": 1.0}]}, keys=["loss"])
    assert [text.get_text() for text in panels[0].get_legend().get_texts()] == ["seed 0", "seed 1"]
    mine = figure.add_subplot()
    assert plot_training(log, ax=mine, keys=["loss"])[1] is mine
    with pytest.raises(ConfigError, match="no numbers entropy.*it has loss, eer"):
        plot_training(log, keys=["entropy"])


def test_log_that_a_kill_cut_off(log):
    whole = read_log(log)
    log.write_text(log.read_text() + '{"step": 9, "lo')
    assert read_log(log) == whole
    log.write_text('{"step": 9, "lo\n{"step": 10}\n')
    with pytest.raises(ConfigError, match="line 1"):
        read_log(log)


def test_embeddings_of_separate_speakers_lie_apart():
    rng = np.random.default_rng(0)
    names = np.repeat(["a", "b", "c"], 15)
    x = 4 * np.repeat(rng.normal(size=(3, 16)), 15, axis=0) + rng.normal(size=(45, 16))
    pytest.importorskip("sklearn")
    plane = project(x)
    centres = np.stack([plane[names == name].mean(0) for name in "abc"])
    nearest = np.linalg.norm(plane[:, None] - centres, axis=2).argmin(1)
    assert (np.array(list("abc"))[nearest] == names).mean() > 0.95
    np.testing.assert_array_equal(project(x), plane)  # seeded
    figure, axes = plot_embeddings(plane, names)
    drawn = {points.get_label(): points.get_offsets() for points in axes.collections}
    np.testing.assert_allclose(drawn["b"], plane[names == "b"])
    with pytest.raises(ConfigError, match="3 speakers for 45"):
        plot_embeddings(plane, ["a", "b", "c"])
    with pytest.raises(ConfigError, match="'tsne' or 'umap'"):
        project(x, "pca")


def test_many_speakers_have_no_legend():
    plane = np.random.default_rng(0).normal(size=(60, 2))
    _, axes = plot_embeddings(plane, np.arange(60) % 30)
    assert axes.get_legend() is None and axes.get_title() == "30 speakers"


def test_scores_and_det(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(4000) % 2
    scores = rng.normal(size=4000) + 2 * labels
    figure, axes = plot_scores(scores, labels)
    assert "(2000)" in axes.get_legend().get_texts()[0].get_text() and axes.get_title().startswith("EER 1")
    _, axes = plot_det({"net": (scores, labels)})
    x, y = axes.lines[0].get_xydata().T
    inner = (x > ndtri(0.02)) & (y > ndtri(0.02)) & (x < 0) & (y < 0)
    # Two normal distributions two deviations apart: the line x + y = -2 on these axes.
    np.testing.assert_allclose((x + y)[inner], -2, atol=0.25)
    saved = save_plot(figure, tmp_path / "new" / "scores.png", [{"score": 1.0, "label": 1}])
    assert matplotlib.image.imread(saved).std() > 0.05
    assert (tmp_path / "new" / "scores.csv").read_text() == "score,label\n1.0,1\n"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["scores.csv", "scores.png"]
