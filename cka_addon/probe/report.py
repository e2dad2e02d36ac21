"""Probes in HTML: a section to put into a report, or a page of its own; all inline, no network, values on hover."""

from __future__ import annotations

import html
import io
import json
from pathlib import Path

from cka_addon import provenance
from cka_addon.probe.result import ProbeResult, percent

HEADING = "Probes: what each layer knows"
_PAGE_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1200px;padding:0 1em;color:#222;background:#fff}
h1{font-size:1.5em;margin-bottom:.2em}h2{font-size:1.15em;margin-top:2em}p.note{color:#555;max-width:60em}
pre{background:#f5f5f5;padding:1em;overflow:auto;font-size:12px;max-height:40em}
"""
_STYLE = """
.probe table{border-collapse:collapse;font-size:13px}.probe td,.probe th{border:1px solid #ccc;padding:.25em .6em;
text-align:left;vertical-align:top}.probe td.n{text-align:right;font-variant-numeric:tabular-nums}
.probe tr.control{background:#f4f4f4}.probe svg{max-width:100%;height:auto}
.probe .bar{display:inline-block;height:.6em;background:#4c5c96}
"""


def _svg(figure) -> str:
    text = io.StringIO()
    figure.savefig(
        text, format="svg", bbox_inches="tight", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    return text.getvalue()[text.getvalue().index("<svg") :]


def _table(p: dict) -> str:
    metric = p["metric"]
    classes = p["kind"] == "class"
    head = ["probe", "model", "layer", metric, "interval", *(["macro-F1"] if classes else []), "control task"]
    head += ["selectivity", "verdict"]
    chance = p["chance"]
    rows = [
        f'<tr class="control"><td></td><td>{"majority class" if classes else "mean"}</td><td></td>'
        f'<td class="n">{percent(chance["value"], metric)}</td><td class="n">{_interval(chance, metric)}</td>'
        + "<td></td>" * (len(head) - 5)
        + "</tr>"
    ]
    for r in p["rows"]:
        role = "" if r["role"] == "model" else ' class="control"'
        f1 = f'<td class="n">{percent(r["macro_f1"], metric)}</td>' if classes else ""
        tip = html.escape(f"solver {r['solver']}, strengths {', '.join(f'{s:g}' for s in r['strengths'])}")
        width = max(0, min(100, round(100 * r["value"])))
        rows.append(
            f'<tr{role} title="{tip}"><td>{r["probe"]}</td><td>{html.escape(r["model"])}</td>'
            f'<td>{html.escape(r["layer"])}</td><td class="n">{percent(r["value"], metric)} '
            f'<span class="bar" style="width:{width / 2:.0f}px"></span></td>'
            f'<td class="n">{_interval(r, metric)}</td>{f1}<td class="n">{percent(r.get("control"), metric)}</td>'
            f'<td class="n">{percent(r.get("selectivity"), metric)}</td><td>{html.escape(r["verdict"] or "")}</td></tr>'
        )
    return f"<table><tr>{''.join(f'<th>{h}</th>' for h in head)}</tr>{''.join(rows)}</table>"


def _interval(row: dict, metric: str) -> str:
    return "" if row.get("lower") is None else f"{percent(row['lower'], metric)} to {percent(row['upper'], metric)}"


def report_section(result: ProbeResult) -> tuple[str, str]:
    """The probes as a section of a page that has its own head, (heading, HTML): curves, maps, a table per property.

    `cka_addon.write_report(..., sections=[report_section(result)])` puts it into the report of a CKA result.
    """
    from cka_addon.probe.plots import plot_curves, plot_map

    parts = [f'<section class="probe"><style>{_STYLE}</style>']
    settings = result.details["settings"]
    parts.append(
        f'<p class="note">Linear probes on frozen layers, {settings["folds"]} folds of whole groups, intervals of '
        f"{settings['confidence']:.0%} by bootstrap over groups; differences between layers are paired, corrected for "
        "their number. Control task: random labels of types (Hewitt and Liang); selectivity is the score less that.</p>"
    )
    parts.append(_svg(plot_curves(result, probe=settings["probes"][0])[0]))
    for model in result.models():
        if len(result.curve(result.names[0], model, settings["probes"][0])) > 1:
            parts.append(_svg(plot_map(result, model, probe=settings["probes"][0])[0]))
    for p in result.properties:
        what = f"{len(p['classes'])} classes" if p["kind"] == "class" else "a number"
        parts.append(
            f"<h3>{html.escape(p['name'])}</h3><p>{p['examples']} {p['unit']}s, {what}, {p['groups']} groups "
            f"({html.escape(p['by'])}), from {html.escape(p['source'])}</p>{_table(p)}"
        )
        notes = [*p["warnings"], *(f"{n} {what}" for what, n in p["counts"].items())]
        if notes:
            parts.append("<ul>" + "".join(f"<li>{html.escape(n)}</li>" for n in notes) + "</ul>")
        if p["vectors"]:
            cells = "".join(
                f"<tr><td>{html.escape(v['vectors'])}</td><td>{html.escape(v['model'])}</td>"
                f'<td>{html.escape(v["layer"])}</td><td class="n">{v["cka"]:.3f}</td>'
                f'<td class="n">{v["lower"]:.3f} to {v["upper"]:.3f}</td><td class="n">{v["permuted"]:.3f}</td></tr>'
                for v in p["vectors"]
            )
            head = "".join(f"<th>{h}</th>" for h in ("vectors", "model", "layer", "CKA", "interval", "permuted"))
            parts.append(f"<table><tr>{head}</tr>{cells}</table>")
    return HEADING, "".join(parts) + "</section>"


def write_report(result: ProbeResult, path: str | Path, *, title: str = "What each layer knows") -> Path:
    """Write the section as a page of its own, with the provenance (atomically)."""
    shown = html.escape(json.dumps(result.details, indent=1, default=str))
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{html.escape(title)}</title><style>{_PAGE_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{report_section(result)[1]}
<h2>Provenance</h2><details><summary>everything that made these numbers</summary><pre>{shown}</pre></details>
</body></html>
"""

    def write(temporary: Path) -> None:
        temporary.write_text(page, encoding="utf-8")

    return provenance.write_atomically(path, write)
