"""Pictures of probes: the curves of all properties over the layers, and a map of layers by properties.

Every function takes `ax` or makes a figure, and returns (figure, axes). `cka_addon.plots.save` writes PNG and PDF.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cka_addon.errors import SpecError
from cka_addon.plots import _axes, _ticks, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cka_addon.probe.result import ProbeResult

COLOURS = "viridis"


def _titles(p: dict) -> str:
    sort = "accuracy" if p["metric"] == "accuracy" else "$R^2$"
    return f"{p['name']}  ({sort}, per {p['unit']})"


def plot_curves(
    result: ProbeResult,
    properties: Sequence[str] | None = None,
    *,
    probe: str = "linear",
    ax: Any = None,
) -> tuple[Figure, np.ndarray]:
    """One panel per property: every model over its layers with its interval, the untrained twin, FBANK and chance.

    ax : one axes per property, or None. Layers are laid out by depth (0 to 1) where models differ in their number.
    """
    names = list(properties or result.names)
    if not names:
        raise SpecError("got no property; expected at least one")
    if ax is None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        columns = min(3, len(names))
        rows = -(-len(names) // columns)
        figure = Figure(figsize=(4.3 * columns, 3.1 * rows + 0.3), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for empty in panels[len(names) :]:
            empty.set_axis_off()
        ax = panels[: len(names)]
    axes = np.atleast_1d(np.asarray(ax, dtype=object))
    trained = result.models("model")
    lengths = {len(result.curve(names[0], m, probe)) for m in trained}
    by_depth = len(lengths - {1}) > 1
    for panel, name in zip(axes, names, strict=True):
        p = result.find(name)
        for k, model in enumerate(trained + result.models("untrained")):
            curve = result.curve(name, model, probe)
            if not curve:
                continue
            untrained = model not in trained
            x = np.arange(len(curve)) / max(1, len(curve) - 1) if by_depth else np.arange(len(curve))
            y = np.array([r["value"] for r in curve])
            twin = _of(model, trained) if untrained else None
            colour = f"C{(k if twin is None else trained.index(twin)) % 10}"
            style = {"linestyle": "--", "marker": "", "alpha": 0.8} if untrained else {"marker": "o", "markersize": 4}
            panel.plot(x, y, label=model, color=colour, linewidth=1.5, **style)
            if not untrained and curve[0]["lower"] is not None:
                low, high = [r["lower"] for r in curve], [r["upper"] for r in curve]
                panel.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        for model in result.models("control"):
            for r in result.curve(name, model, probe):
                panel.axhline(r["value"], color="0.45", linestyle="-.", linewidth=1.2, label=model)
        chance = "majority" if p["kind"] == "class" else "mean"
        panel.axhline(p["chance"]["value"], color="0.45", linestyle=":", linewidth=1.2, label=chance)
        panel.set_title(_titles(p), fontsize=10)
        if by_depth:
            panel.set_xlabel("relative depth")
        else:
            longest = max((result.curve(name, m, probe) for m in trained), key=len)
            layers = short_names([r["layer"] for r in longest])
            ticks = _ticks(len(layers), 14)
            slanted = any(len(n) > 3 for n in layers)
            panel.set_xticks(
                ticks, [layers[i] for i in ticks], rotation=30 if slanted else 0, ha="right" if slanted else "center"
            )
            panel.set_xlabel("layer")
        if p["kind"] == "class":
            panel.set_ylim(0, None)
        panel.grid(alpha=0.3)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    return axes[0].figure, axes


def _of(untrained: str, trained: Sequence[str]) -> str | None:
    """The model whose twin this is, by its name."""
    return next((m for m in trained if untrained.startswith(m)), None)


def scaled(result: ProbeResult, name: str, rows: Sequence[dict]) -> np.ndarray:
    """Scores as the share of the way from chance to perfect: 0 is what a guess gives, 1 is no mistake."""
    chance = result.find(name)["chance"]["value"]
    return np.array([(r["value"] - chance) / max(1e-12, 1 - chance) for r in rows])


def plot_map(
    result: ProbeResult, model: str | None = None, *, probe: str = "linear", ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Heat map of properties (rows) against the layers of one model (columns), from chance (0) to perfect (1).

    The number of every cell is the accuracy in percent, or R2.
    """
    model = model or result.models()[0]
    curves = {n: result.curve(n, model, probe) for n in result.names}
    curves = {n: c for n, c in curves.items() if c}
    if not curves:
        raise SpecError(f"got model '{model}'; expected one of {', '.join(result.models())}")
    values = np.stack([scaled(result, n, c) for n, c in curves.items()])
    layers = short_names([r["layer"] for r in next(iter(curves.values()))])
    figure, ax = _axes(ax, (max(4.2, min(12, 2.6 + 0.5 * len(layers))), max(2.0, 1.3 + 0.42 * len(curves))))
    image = ax.imshow(np.clip(values, 0, 1), vmin=0, vmax=1, cmap=COLOURS, aspect="auto", interpolation="nearest")
    ticks = _ticks(len(layers))
    slanted = any(len(n) > 3 for n in layers)
    ax.set_xticks(ticks, [layers[i] for i in ticks], rotation=30 if slanted else 0, ha="right" if slanted else "center")
    ax.set_yticks(np.arange(len(curves)), list(curves))
    ax.set_xlabel("layer")
    ax.set_title(f"{model}: what each layer knows", fontsize=11)
    if len(layers) <= 16:
        for i, (name, curve) in enumerate(curves.items()):
            accuracy = result.find(name)["metric"] == "accuracy"
            best = int(np.argmax([r["value"] for r in curve]))
            for j, r in enumerate(curve):
                text = f"{100 * r['value']:.0f}" if accuracy else f"{r['value']:.2f}".replace("0.", ".")
                colour = "black" if np.clip(values[i, j], 0, 1) > 0.6 else "white"
                weight = "bold" if j == best else "normal"
                ax.text(j, i, text, ha="center", va="center", fontsize=7, color=colour, fontweight=weight)
    figure.colorbar(image, ax=ax, fraction=0.046, pad=0.02).set_label("chance (0) to perfect (1)")
    return figure, ax
