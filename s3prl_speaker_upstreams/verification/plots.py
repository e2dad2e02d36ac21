"""Pictures of a training and of what came out of it: ``plot_x(data, *, ax=None) -> (figure, axes)``.

No function opens a window or changes matplotlib's settings; :func:`save_plot` writes a picture and, beside it, the same
numbers as csv.

>>> figure, axes = plot_scores([2.0, 1.5, 0.1, 0.3], [1, 1, 0, 0])
>>> axes.get_xlabel()
'score'
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from s3prl_speaker_upstreams.common.files import write_text, write_whole
from s3prl_speaker_upstreams.errors import ConfigError, MissingPackage
from s3prl_speaker_upstreams.verification.metrics import det_curve, eer, eer_threshold

__all__ = ["plot_det", "plot_embeddings", "plot_scores", "plot_training", "project", "read_log", "save_plot"]

_DET_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


def _axes(ax, size: tuple[float, float]):
    if ax is not None:
        return ax.figure, ax
    # Figure without pyplot: pyplot keeps every figure alive and may need a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


# ---------------------------------------------------------------------------------------------- training curves
def read_log(path: str | os.PathLike) -> list[dict]:
    """Rows of a JSON-lines log; a last line that was cut off by a kill is left out.

    Raises ConfigError for any other line that is not a JSON object.

    >>> import tempfile
    >>> name = tempfile.mkstemp()[1]
    >>> _ = Path(name).write_text('{"step": 1, "loss": 7.6}\\n{"step": 2, "lo')
    >>> read_log(name)
    [{'step': 1, 'loss': 7.6}]
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as problem:
            if number == len(lines):
                break
            raise ConfigError(f"{path}, line {number}: got {line[:60]!r}, expected a JSON object") from problem
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, line {number}: got {line[:60]!r}, expected a JSON object")
        rows.append(row)
    return rows


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def plot_training(
    log: str | os.PathLike | Sequence[Mapping] | Mapping[str, str | os.PathLike | Sequence[Mapping]],
    *,
    ax=None,
    keys: Sequence[str] | None = None,
):
    """Training curves, one panel for every logged number, of one run or of several by name.

    Parameters
    ----------
    log : path of a JSON-lines file, list of rows, or mapping of run name -> either
        Rows hold ``step`` and numbers; not every row needs every key (error rates are rarer than losses).
    ax : Axes or sequence of Axes, optional
        One for every key.
    keys : sequence of str, optional
        Which numbers; by default all, in the order in which they are first logged.

    Returns
    -------
    figure, axes
        Axes is one, if one was given, else an array (panels,).

    >>> rows = [{"step": s, "loss": 7.6 / (s + 1), "lr": 0.1} for s in range(5)]
    >>> figure, axes = plot_training(rows)
    >>> [panel.get_title() for panel in axes]
    ['loss', 'lr']
    """
    runs = log if isinstance(log, Mapping) else {"": log}
    read = {name: read_log(rows) if isinstance(rows, (str, os.PathLike)) else list(rows) for name, rows in runs.items()}
    found = dict.fromkeys(
        key
        for rows in read.values()
        for row in rows
        for key, value in row.items()
        if _is_number(value) and key not in ("step", "epoch", "batch", "time")
    )
    if keys is None:
        keys = list(found)
    missing = [key for key in keys if key not in found]
    if missing or not keys:
        raise ConfigError(f"got no numbers {', '.join(missing) or 'at all'} in the log; it has {', '.join(found)}")
    if ax is None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        columns = min(3, len(keys))
        lines = -(-len(keys) // columns)
        figure = Figure(figsize=(4.2 * columns, 2.7 * lines), layout="constrained")
        FigureCanvasAgg(figure)
        panels = np.atleast_1d(figure.subplots(lines, columns)).ravel()
        for empty in panels[len(keys) :]:
            empty.remove()
        panels = panels[: len(keys)]
    else:
        panels = np.atleast_1d(np.asarray(ax, dtype=object)).ravel()
        if len(panels) != len(keys):
            raise ConfigError(f"got {len(panels)} axes for {len(keys)} keys: {', '.join(keys)}")
        figure = panels[0].figure
    for panel, key in zip(panels, keys, strict=True):
        for name, rows in read.items():
            points = [(row.get("step", n), row[key]) for n, row in enumerate(rows) if _is_number(row.get(key))]
            points.sort()
            if points:
                x, y = zip(*points, strict=True)
                panel.plot(x, y, marker="o" if len(x) < 40 else "", markersize=3, linewidth=1.2, label=name or None)
        panel.set_title(key)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        if len(read) > 1:
            panel.legend(fontsize="small")
    return figure, panels if ax is None or len(panels) > 1 else panels[0]


# ---------------------------------------------------------------------------------------------- embeddings
def project(x: np.ndarray, method: str = "tsne", seed: int = 0) -> np.ndarray:
    """Embeddings (N, D), of unit length after their mean is removed, laid out in the plane by t-SNE or UMAP: (N, 2).

    Raises MissingPackage with the line that installs scikit-learn or umap-learn.

    >>> project(np.random.default_rng(0).normal(size=(12, 4))).shape
    (12, 2)
    """
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or len(x) < 4:
        raise ConfigError(f"got embeddings of shape {x.shape}, expected (N, D) with N of at least 4")
    x = x - x.mean(0)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    if method == "tsne":
        try:
            from sklearn.manifold import TSNE
        except ImportError as problem:
            raise MissingPackage("t-SNE needs scikit-learn: pip install scikit-learn") from problem
        perplexity = min(30.0, (len(x) - 1) / 3)
        return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(x)
    if method == "umap":
        try:
            from umap import UMAP
        except ImportError as problem:
            raise MissingPackage("UMAP needs umap-learn: pip install umap-learn") from problem
        neighbours = min(15, len(x) - 1)
        return UMAP(n_components=2, n_neighbors=neighbours, metric="cosine", random_state=seed).fit_transform(x)
    raise ConfigError(f"method: got {method!r}, expected 'tsne' or 'umap'")


def plot_embeddings(x: np.ndarray, speakers: Sequence | None = None, *, method: str = "tsne", seed: int = 0, ax=None):
    """Embeddings in the plane, coloured by speaker.

    Parameters
    ----------
    x : (N, D), or (N, 2) that :func:`project` returned
    speakers : sequence of N labels, optional
    method : {"tsne", "umap"}
    seed : int
    ax : Axes, optional

    >>> figure, axes = plot_embeddings(np.random.default_rng(0).normal(size=(12, 4)), list("aabbccaabbcc"))
    >>> [text.get_text() for text in axes.get_legend().get_texts()]
    ['a', 'b', 'c']
    """
    x = np.asarray(x)
    if speakers is not None and len(speakers) != len(x):
        raise ConfigError(f"got {len(speakers)} speakers for {len(x)} embeddings")
    plane = x if x.ndim == 2 and x.shape[1] == 2 else project(x, method, seed)
    figure, axes = _axes(ax, (6.0, 5.0))
    names = np.array(["" if speakers is None else str(name) for name in (speakers if speakers is not None else x)])
    distinct = sorted(set(names))
    import matplotlib

    colours = matplotlib.colormaps["tab10" if len(distinct) <= 10 else "tab20" if len(distinct) <= 20 else "hsv"]
    for number, name in enumerate(distinct):
        colour = colours(number) if len(distinct) <= 20 else colours(number / len(distinct))
        points = plane[names == name]
        axes.scatter(points[:, 0], points[:, 1], s=14, color=colour, label=name or None, linewidths=0)
    if speakers is not None and len(distinct) <= 20:
        axes.legend(title="speaker", fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    elif speakers is not None:
        axes.set_title(f"{len(distinct)} speakers")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel({"tsne": "t-SNE", "umap": "UMAP"}.get(method, method))
    return figure, axes


# ---------------------------------------------------------------------------------------------- scores
def plot_scores(scores: Sequence | np.ndarray, labels: Sequence | np.ndarray, *, ax=None):
    """Distribution of target and non-target scores, and the threshold of equal error.

    Parameters
    ----------
    scores, labels : (trials,)
    ax : Axes, optional

    >>> figure, axes = plot_scores([2.0, 1.5, 0.1, 0.3], [1, 1, 0, 0])
    >>> axes.get_title()
    'EER 0.00 %'
    """
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels).astype(bool)
    figure, axes = _axes(ax, (5.5, 3.6))
    bins = np.histogram_bin_edges(scores, bins=60)
    for name, chosen, colour in (("different speakers", ~labels, "tab:orange"), ("same speaker", labels, "tab:blue")):
        axes.hist(scores[chosen], bins, density=True, alpha=0.6, color=colour, label=f"{name} ({int(chosen.sum())})")
    axes.axvline(eer_threshold(scores, labels), color="black", linestyle="--", linewidth=1, label="equal error")
    axes.set_xlabel("score")
    axes.set_ylabel("density")
    axes.set_title(f"EER {100 * eer(scores, labels):.2f} %")
    axes.legend(fontsize="small")
    return figure, axes


def plot_det(curves: Mapping[str, tuple], *, ax=None):
    """Detection error trade-off of several systems, on axes that make normally distributed scores straight lines.

    Parameters
    ----------
    curves : mapping of name -> (scores, labels)
    ax : Axes, optional

    >>> figure, axes = plot_det({"net": ([2.0, 1.5, 0.1, 0.3, 0.2, 0.4], [1, 1, 1, 0, 0, 0])})
    >>> axes.get_ylabel()
    'miss rate / %'
    """
    from scipy.special import ndtri

    if not curves:
        raise ConfigError("got no curves, expected {name: (scores, labels)}")
    figure, axes = _axes(ax, (5.0, 5.0))
    low, high = _DET_TICKS[0], _DET_TICKS[-1]
    for name, (scores, labels) in curves.items():
        miss, false_alarm, _ = det_curve(scores, labels)
        x, y = ndtri(np.clip(false_alarm, low / 2, 0.999)), ndtri(np.clip(miss, low / 2, 0.999))
        axes.plot(x, y, linewidth=1.4, label=f"{name}: EER {100 * eer(scores, labels):.2f} %")
    ticks = ndtri(np.array(_DET_TICKS))
    names = [f"{100 * tick:g}" for tick in _DET_TICKS]
    axes.set_xticks(ticks, names)
    axes.set_yticks(ticks, names)
    axes.set_xlim(ndtri(low), ndtri(high))
    axes.set_ylim(ndtri(low), ndtri(high))
    axes.plot([ndtri(low), ndtri(high)], [ndtri(low), ndtri(high)], color="grey", linewidth=0.7, linestyle=":")
    axes.set_aspect("equal")
    axes.set_xlabel("false alarm rate / %")
    axes.set_ylabel("miss rate / %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower left")
    return figure, axes


def save_plot(figure, path: str | os.PathLike, rows: Iterable[Mapping] | None = None, dpi: int = 130) -> Path:
    """Write a picture (the suffix of ``path`` says which kind) and ``rows`` beside it as csv, each whole or not at all.

    >>> import tempfile
    >>> figure, _ = plot_scores([2.0, 1.5, 0.1, 0.3], [1, 1, 0, 0])
    >>> save_plot(figure, Path(tempfile.mkdtemp()) / "scores.png", [{"score": 2.0}]).name
    'scores.png'
    """
    import csv
    import io

    path = write_whole(path, lambda beside: figure.savefig(beside, dpi=dpi))
    if rows is not None:
        rows = [dict(row) for row in rows]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(path.with_suffix(".csv"), text.getvalue())
    return path
