"""One HTML file with all heat maps, lines, layer weights and the provenance; opens in any browser without a network.

Values show on hover, the layer of the line chart is chosen from a list. The page, its style and its script are files in
`page/`; they are put into the one file that is written, with the maps as SVG and the numbers as JSON.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cka_addon import provenance
from cka_addon.plots import COLOURS, short_names

if TYPE_CHECKING:
    from cka_addon.layer_weights import LayerWeights
    from cka_addon.result import CKAResult

_PAGE = Path(__file__).parent / "page"


def _fill(template: str, **parts: str) -> str:
    """Put parts into the places {{name}} of a template, in one go: a part that holds such a place stays as it is.

    >>> _fill("<b>{{title}}</b>", title="a {{b}}")
    '<b>a {{b}}</b>'
    """
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match.group(1)], template)


def _colours(values: np.ndarray, name: str = COLOURS) -> np.ndarray:
    """Hex colour of every value on the fixed 0-1 scale."""
    import matplotlib
    from matplotlib.colors import to_hex

    scale = matplotlib.colormaps[name]
    return np.vectorize(lambda v: "#ffffff" if np.isnan(v) else to_hex(scale(min(max(v, 0.0), 1.0))), otypes=[object])(
        values
    )


def _heatmap(result: CKAResult, a: str, b: str) -> str:
    """SVG heat map of model a (columns) against b (rows), layer 0 at the bottom left."""
    rows, columns = result.rows(b), result.rows(a)
    colours = _colours(result.values[rows, columns])
    high, wide = colours.shape
    cell = max(8, min(26, 520 // max(high, wide)))
    names_a, names_b = short_names(result.layers(a)), short_names(result.layers(b))
    left = 34 + 7 * max(map(len, names_b))
    bottom = 36 + (7 * max(map(len, names_a)) if max(map(len, names_a)) > 3 else 6)
    width, height = left + wide * cell + 74, high * cell + bottom + 6
    out = [
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(b)} against {html.escape(a)}">'
    ]
    for i in range(high):
        y = 4 + (high - 1 - i) * cell
        for j in range(wide):
            out.append(
                f'<rect class="c" x="{left + j * cell}" y="{y}" width="{cell}" height="{cell}" fill="{colours[i, j]}" '
                f'data-i="{rows.start + i}" data-j="{columns.start + j}"/>'
            )
        if cell >= 12 or i % 2 == 0:
            out.append(
                f'<text x="{left - 5}" y="{y + cell / 2 + 4}" text-anchor="end">{html.escape(names_b[i])}</text>'
            )
    below = 4 + high * cell
    for j, name in enumerate(names_a):
        if cell < 12 and j % 2:
            continue
        x = left + j * cell + cell / 2
        if len(name) > 3:
            out.append(
                f'<text transform="translate({x + 4},{below + 8}) rotate(-60)" text-anchor="end">'
                f"{html.escape(name)}</text>"
            )
        else:
            out.append(f'<text x="{x}" y="{below + 14}" text-anchor="middle">{html.escape(name)}</text>')
    out.append(
        f'<text class="axis" x="{left + wide * cell / 2}" y="{height - 4}" text-anchor="middle">{html.escape(a)}</text>'
    )
    middle = 4 + high * cell / 2
    out.append(
        f'<text class="axis" transform="translate(12,{middle}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(b)}</text>"
    )
    # The colour bar, 0 at the bottom.
    bar, steps = left + wide * cell + 14, 32
    for k, colour in enumerate(_colours(np.linspace(0, 1, steps))):
        y = 4 + (steps - 1 - k) * high * cell / steps
        out.append(f'<rect x="{bar}" y="{y:.2f}" width="12" height="{high * cell / steps + 0.5:.2f}" fill="{colour}"/>')
    for v in (0.0, 0.5, 1.0):
        y = 4 + (1 - v) * high * cell
        out.append(f'<text x="{bar + 17}" y="{min(max(y + 4, 12), 4 + high * cell):.1f}">{v:.1f}</text>')
    return "".join(out) + "</svg>"


def _weights(items: Sequence[LayerWeights]) -> str:
    """HTML tables of layer weights, one row per task, cells shaded by their share."""
    parts = []
    for what in ("weights", "corrected"):
        chosen = [w for w in items if getattr(w, what) is not None]
        if not chosen:
            continue
        longest = max(len(w.weights) for w in chosen)
        title = "Softmax weights" if what == "weights" else "Corrected for the norm of each layer"
        head = "".join(f"<th>{i}</th>" for i in range(longest))
        rows = []
        for w in chosen:
            values = getattr(w, what)
            colours = _colours(1 - 0.7 * values / values.max(), "gray")
            cells = "".join(
                f'<td class="n" style="background:{c}" data-t="{html.escape(w.task)}, layer {i}: {v:.4f}">{v:.2f}</td>'
                for i, (v, c) in enumerate(zip(values, colours, strict=True))
            )
            rows.append(f"<tr><th>{html.escape(w.task)}</th><td>{html.escape(w.upstream)}</td>{cells}</tr>")
        parts.append(f"<h3>{title}</h3><table><tr><th>task</th><th>upstream</th>{head}</tr>{''.join(rows)}</table>")
    return "".join(parts)


def write_report(
    result: CKAResult,
    path: str | Path,
    *,
    weights: Sequence[LayerWeights] = (),
    title: str = "Layer-wise similarity (linear CKA)",
    sections: Sequence[tuple[str, str]] = (),
) -> Path:
    """Write the report of a result, and of layer weights where there are any, to one HTML file (atomically).

    sections : more to show, (heading, HTML) each
    """

    def plain(x: np.ndarray | None) -> list | None:
        return None if x is None else [[None if np.isnan(v) else round(float(v), 6) for v in row] for row in x]

    details = result.details
    counts, options = details["counts"], details["options"]
    data = {
        "measure": result.measure.upper() if len(result.measure) <= 5 else result.measure,
        "labels": [
            f"{m} {short_names([layer])[0]}" if layer.startswith("layer_") else f"{m} {layer}"
            for m, layer in result.labels
        ],
        "models": [{"name": m, "start": result.rows(m).start, "stop": result.rows(m).stop} for m in result.names],
        "values": plain(result.values),
        "lower": plain(result.lower),
        "upper": plain(result.upper),
        "permuted": plain(result.baseline),
        "confidence": f"{options.get('confidence', 0.95):.0%}",
    }
    maps = []
    for k, a in enumerate(result.names):
        for b in result.names[k:]:
            if result.mask[result.rows(b), result.rows(a)].all():
                caption = html.escape(a if a == b else f"{b} against {a}")
                maps.append(f"<figure><figcaption>{caption}</figcaption>{_heatmap(result, a, b)}</figure>")
    batch = f", minibatches of {options['batch_size']}" if options["mode"] == "minibatch" else ""
    facts = {
        "models": ", ".join(f"{m.name} ({m.provenance.get('upstream', '-')})" for m in result.models),
        "estimator": details["estimator"],
        "mode": f"{options['mode']}{batch}",
        "examples": f"{counts['examples']} {options['examples']} of {counts['utterances']} utterances"
        + (f", {counts['left_out']} recordings left out" if counts.get("left_out") else ""),
        "alignment": details.get("alignment", {}).get("rule", "-"),
        "intervals": details["interval"],
        "seed": options.get("seed"),
    }
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items())
    blob = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    shown = html.escape(json.dumps(details, indent=1, default=str))
    parts = [("Layer weights of downstream tasks", _weights(weights))] if weights else []
    page = _fill(
        (_PAGE / "report.html").read_text(encoding="utf-8"),
        title=html.escape(title),
        style=(_PAGE / "report.css").read_text(encoding="utf-8"),
        facts=rows,
        maps="".join(maps),
        sections="".join(f"<h2>{html.escape(name)}</h2>{body}" for name, body in [*parts, *sections]),
        provenance=shown,
        data=blob,
        script=(_PAGE / "report.js").read_text(encoding="utf-8"),
    )
    return provenance.write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
