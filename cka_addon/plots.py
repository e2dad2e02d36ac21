"""Pictures of CKA: heat maps, lines and layer weights.

Every function takes `ax` or makes a figure, and returns (figure, axes). Colours run from 0 to 1, layer 0 is at the
bottom left. `save` writes PNG and PDF.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cka_addon import provenance
from cka_addon.errors import SpecError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cka_addon.layer_weights import LayerWeights
    from cka_addon.result import CKAResult

COLOURS = "magma"
_ANNOTATE_UP_TO = 8  # layers on the longer side up to which values are written into the cells


def _axes(ax, size: tuple[float, float]):
    """The given axes, or new ones in a figure that no window manager and no global state holds."""
    if ax is not None:
        return ax.figure, ax
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def short_names(layers: Sequence[str]) -> list[str]:
    """Layer names for an axis: numbers where they are numbered, names where they have names.

    >>> short_names(["layer_0", "layer_1"]), short_names(["block_1", "mfa"])
    (['0', '1'], ['block_1', 'mfa'])
    """
    if all(n.startswith("layer_") for n in layers):
        return [n.removeprefix("layer_") for n in layers]
    return list(layers)


def _ticks(count: int, room: int = 26) -> np.ndarray:
    return np.arange(0, count, max(1, int(np.ceil(count / room))))


def _label(axis, name: str, layers: Sequence[str], size: int | None = None) -> None:
    names = short_names(layers)
    ticks = _ticks(len(names))
    long = any(len(n) > 3 for n in names)
    numbered = names != list(layers)
    text = f"{name} layer" if numbered else name
    if axis.axis_name == "x":
        axis.set_ticks(ticks, [names[i] for i in ticks], rotation=45 if long else 0, ha="right" if long else "center")
    else:
        axis.set_ticks(ticks, [names[i] for i in ticks])
    axis.axes.tick_params(axis=axis.axis_name, labelsize=size or (9 if len(names) <= 16 else 7))
    axis.set_label_text(text)


def _measure(result: CKAResult) -> str:
    """What is drawn, with the estimator: it belongs on every picture."""
    if result.measure != "cka":
        return {"cca": "mean CCA", "svcca": "SVCCA", "pwcca": "PWCCA", "rsa": "RSA", "knn": "mutual k-NN"}.get(
            result.measure, result.measure.capitalize()
        )
    return f"linear CKA ({result.details['estimator'].split(' (')[0]})"


def _short(result: CKAResult) -> str:
    return "CKA" if result.measure == "cka" else _measure(result)


def plot_heatmap(
    result: CKAResult,
    a: str | None = None,
    b: str | None = None,
    *,
    what: str = "values",
    ax: Axes | None = None,
    colour_bar: bool = True,
    title: str | None = None,
) -> tuple[Figure, Axes]:
    """Heat map of model `a` (columns) against model `b` (rows), of one model with itself where `b` is None.

    what : "values" or "baseline" (permuted examples)
    """
    a = a or result.names[0]
    b = b or a
    values = result.between(b, a, what)
    rows, columns = values.shape
    size = (max(3.6, min(11, 1.9 + 0.32 * columns)), max(2.2, min(10, 1.4 + 0.32 * rows)))
    figure, ax = _axes(ax, size)
    image = ax.imshow(values, origin="lower", vmin=0, vmax=1, cmap=COLOURS, aspect="equal", interpolation="nearest")
    _label(ax.xaxis, a, result.layers(a))
    _label(ax.yaxis, b, result.layers(b))
    if max(rows, columns) <= _ANNOTATE_UP_TO:
        for i in range(rows):
            for j in range(columns):
                colour = "black" if values[i, j] > 0.6 else "white"
                ax.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", color=colour, fontsize=8)
    ax.set_title(title if title is not None else (f"{a}" if a == b else f"{b} against {a}"), fontsize=11)
    if colour_bar:
        # As high as the picture, whatever its shape.
        beside = ax.inset_axes((1 + 0.25 / columns, 0, min(0.12, 0.45 / columns), 1))
        bar = figure.colorbar(image, cax=beside)
        label = _measure(result).replace(" (", "\n(") + ("" if what == "values" else ",\nexamples permuted")
        bar.set_label(label, fontsize=8 if rows < 6 else 9)
    return figure, ax


def plot_grid(result: CKAResult, models: Sequence[str] | None = None, *, ax=None) -> tuple[Figure, np.ndarray]:
    """Heat maps of every model against every model, one colour bar; pairs that were not computed stay empty.

    ax : (models, models) array of axes, or None
    """
    models = list(models or result.names)
    n = len(models)
    sizes = [len(result.layers(m)) for m in models]
    if ax is None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        # Axes as wide as the model has layers, so that cells are squares of one size; short models get room for labels.
        share = [max(s, 0.3 * max(sizes), 3) for s in sizes]
        side = min(14.0, 2.2 + 0.26 * sum(share) + 0.5 * n)
        figure = Figure(figsize=(side + 0.9, side), layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.subplots(n, n, squeeze=False, width_ratios=share, height_ratios=share[::-1])
    else:
        ax = np.asarray(ax)
        figure = ax.flat[0].figure
    image = None
    for r, b in enumerate(reversed(models)):
        for c, a in enumerate(models):
            cell = ax[r, c]
            rows, columns = result.rows(b), result.rows(a)
            if not result.mask[rows, columns].all():
                cell.set_axis_off()
                continue
            image = cell.imshow(
                result.values[rows, columns],
                origin="lower",
                vmin=0,
                vmax=1,
                cmap=COLOURS,
                aspect="auto",
                interpolation="nearest",
            )
            _label(cell.xaxis, a, result.layers(a), 7 if n > 2 else None)
            _label(cell.yaxis, b, result.layers(b), 7 if n > 2 else None)
            left = next((k for k in range(n) if result.mask[rows, result.rows(models[k])].all()), c)
            below = [m for m in models if result.mask[result.rows(m), columns].all()]
            if c != left:
                cell.set_ylabel("")
                cell.set_yticklabels([])
            if b != below[0]:
                cell.set_xlabel("")
                cell.set_xticklabels([])
    if image is None:
        raise SpecError("none of these pairs of models was computed; expected at least one: compute with --pairs all")
    figure.colorbar(image, ax=ax.ravel().tolist(), fraction=0.03, pad=0.02).set_label(_measure(result))
    return figure, ax


def plot_lines(
    result: CKAResult, to: str, models: Sequence[str] | None = None, *, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Similarity of every layer of the models to one layer ("model/layer"), with the intervals as bands."""
    target = result.find(to)
    label = "/".join(result.labels[target])
    figure, ax = _axes(ax, (6.4, 3.8))
    drawn = 0
    for model in models or result.names:
        rows = result.rows(model)
        if not result.mask[rows, target].all():
            continue
        _line(ax, result, np.arange(rows.start, rows.stop), np.full(rows.stop - rows.start, target), model)
        drawn += 1
    if not drawn:
        raise SpecError(f"no model was compared with {label}; compute with --pairs all")
    _finish_lines(ax, result, models, f"{_short(result)} with {label}", "layer")
    return figure, ax


def plot_adjacent(
    result: CKAResult, models: Sequence[str] | None = None, *, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Similarity of each layer to the next one within its model: a dip is a change of representation."""
    figure, ax = _axes(ax, (6.4, 3.8))
    chosen = [m for m in (models or result.names) if len(result.layers(m)) > 1]
    chosen = [m for m in chosen if result.mask[result.rows(m), result.rows(m)].all()]
    if not chosen:
        raise SpecError("no model with two layers was compared with itself; compute with --pairs all or within")
    for model in chosen:
        rows = result.rows(model)
        first = np.arange(rows.start, rows.stop - 1)
        _line(ax, result, first, first + 1, model)
    _finish_lines(ax, result, chosen, f"{_short(result)} of layer i with layer i + 1", "layer i")
    return figure, ax


def _line(ax, result: CKAResult, i: np.ndarray, j: np.ndarray, label: str) -> None:
    x = np.arange(len(i))
    (line,) = ax.plot(x, result.values[i, j], marker="o", markersize=4, linewidth=1.6, label=label)
    if result.lower is not None and result.upper is not None:
        ax.fill_between(x, result.lower[i, j], result.upper[i, j], color=line.get_color(), alpha=0.2, linewidth=0)


def _finish_lines(ax, result: CKAResult, models, title: str, x_label: str) -> None:
    models = list(models or result.names)
    longest = max((result.layers(m) for m in models), key=len)
    names = short_names(longest) if len(models) == 1 else [str(i) for i in range(len(longest))]
    ticks = _ticks(len(names), 18)
    ax.set_xticks(ticks, [names[i] for i in ticks])
    ax.set_ylim(-0.02, 1.02)
    ax.set_xlabel(x_label)
    ax.set_ylabel(_measure(result))
    ax.set_title(title, fontsize=11)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=9)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def plot_layer_weights(weights: LayerWeights | Sequence[LayerWeights], *, ax=None) -> tuple[Figure, np.ndarray]:
    """Bars of the layer weights, one panel per task; beside them the shares corrected for the layers' norms.

    ax : array of axes, one per task, or None
    """
    items = list(weights) if isinstance(weights, Sequence) else [weights]
    if not items:
        raise SpecError("got no layer weights; expected at least one checkpoint")
    if ax is None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        longest = max(len(w.weights) for w in items)
        columns = 1 if len(items) == 1 else 2
        rows = -(-len(items) // columns)
        size = (columns * max(3.8, min(8, 1.2 + 0.3 * longest)), 0.5 + 2.5 * rows)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for empty in panels[len(items) :]:
            empty.set_axis_off()
        ax = panels[: len(items)]
    axes = np.atleast_1d(ax)
    for panel, w in zip(axes, items, strict=True):
        x = np.arange(len(w.weights))
        both = w.corrected is not None
        width = 0.4 if both else 0.7
        panel.bar(x - (width / 2 if both else 0), w.weights, width, label="weight", color="#4c5c96")
        if both:
            panel.bar(x + width / 2, w.corrected, width, label="corrected for norm", color="#e8825a")
            panel.legend(frameon=False, fontsize=8)
        names = short_names(w.layers) if w.layers else [str(i) for i in x]
        ticks = _ticks(len(names), 18)
        long = any(len(n) > 3 for n in names)
        panel.set_xticks(ticks, [names[i] for i in ticks], rotation=30 if long else 0, fontsize=8)
        panel.set_title(f"{w.task}  ({w.upstream})", fontsize=10)
        panel.set_ylabel("share")
        panel.set_xlabel("layer")
        panel.set_ylim(0, None)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    return axes[0].figure, axes


def plot_layer_weight_map(
    weights: Sequence[LayerWeights], *, corrected: bool = False, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Heat map of tasks (rows) against layers (columns); all tasks must have used upstreams of as many layers."""
    items = list(weights)
    if not items:
        raise SpecError("got no layer weights; expected at least one checkpoint")
    counts = {len(w.weights) for w in items}
    if len(counts) > 1:
        raise SpecError(f"the tasks have {sorted(counts)} layers; expected one upstream: draw one map per upstream")
    shares = [w.corrected if corrected else w.weights for w in items]
    if any(s is None for s in shares):
        raise SpecError(
            "the weights are not corrected; measure the layers' norms first (--store or --model and --audio)"
        )
    values = np.stack([s for s in shares if s is not None])
    figure, ax = _axes(ax, (max(4.5, min(11, 2.6 + 0.36 * values.shape[1])), max(2.0, 1.3 + 0.36 * len(items))))
    image = ax.imshow(values, vmin=0, vmax=1 if values.max() > 0.5 else None, cmap="viridis", aspect="auto")
    names = short_names(items[0].layers) if items[0].layers else [str(i) for i in range(values.shape[1])]
    ticks = _ticks(len(names))
    ax.set_xticks(ticks, [names[i] for i in ticks])
    several = len({w.upstream for w in items}) > 1
    ax.set_yticks(np.arange(len(items)), [f"{w.task} ({w.upstream})" if several else w.task for w in items])
    ax.set_xlabel("layer")
    upstream = "" if several else f"{items[0].upstream}: "
    ax.set_title(f"{upstream}layer weights" + (", corrected for norm" if corrected else ""), fontsize=11)
    if values.shape[1] <= 13:
        for i, row in enumerate(values):
            for j, v in enumerate(row):
                colour = "black" if v > 0.6 * values.max() else "white"
                ax.text(j, i, f"{v:.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=ax, fraction=0.046, pad=0.02).set_label("share")
    return figure, ax


def save(figure: Figure, path: str | Path, formats: Sequence[str] = ("png", "pdf")) -> list[Path]:
    """Write a figure as PATH.png and PATH.pdf (PATH without ending), atomically."""
    base = Path(path)
    written = []
    for ending in formats:
        target = base.with_name(f"{base.name}.{ending}")
        metadata = {"CreationDate": None} if ending == "pdf" else None
        draw = functools.partial(
            figure.savefig, format=ending, dpi=200, metadata=metadata, bbox_inches="tight", pad_inches=0.08
        )
        written.append(provenance.write_atomically(target, draw))
    return written
