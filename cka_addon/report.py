"""One HTML file with all heat maps, lines, layer weights and the provenance; opens in any browser without a network.

Values show on hover, the layer of the line chart is chosen from a list. All is inline: SVG, a little script, data.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cka_addon import provenance
from cka_addon.plots import COLOURS, short_names

if TYPE_CHECKING:
    from cka_addon.layer_weights import LayerWeights
    from cka_addon.result import CKAResult

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1200px;padding:0 1em;color:#222;background:#fff}
h1{font-size:1.5em;margin-bottom:.2em}h2{font-size:1.15em;margin-top:2em}p.note{color:#555;max-width:60em}
.maps{display:flex;flex-wrap:wrap;gap:1.2em 1.6em;align-items:flex-start}figure{margin:0}figcaption{font-weight:600}
svg text{font:11px system-ui,sans-serif;fill:#333}svg .axis{font-size:12px}rect.c:hover{stroke:#fff;stroke-width:1.5}
#tip{position:fixed;display:none;pointer-events:none;background:#222;color:#fff;padding:.4em .7em;border-radius:4px;
font-size:13px;white-space:pre;z-index:9}
table{border-collapse:collapse;font-size:13px}td,th{border:1px solid #ccc;padding:.25em .6em;text-align:left;
vertical-align:top}td.n{text-align:right;font-variant-numeric:tabular-nums}pre{background:#f5f5f5;padding:1em;
overflow:auto;font-size:12px;max-height:40em}select{font-size:14px}
"""

_SCRIPT = """
const D=JSON.parse(document.getElementById('data').textContent),tip=document.getElementById('tip');
const f=v=>v===null?'not computed':v.toFixed(4);
function text(i,j){let t=D.labels[j]+'\\n'+D.labels[i]+'\\nCKA '+f(D.values[i][j]);
 if(D.lower)t+='\\n'+D.confidence+' interval '+f(D.lower[i][j])+' to '+f(D.upper[i][j]);
 if(D.permuted)t+='\\npermuted '+f(D.permuted[i][j]);return t}
document.addEventListener('mousemove',e=>{const c=e.target.closest&&e.target.closest('[data-i],[data-t]');
 if(!c){tip.style.display='none';return}
 tip.textContent=c.dataset.t!==undefined?c.dataset.t:text(+c.dataset.i,+c.dataset.j);tip.style.display='block';
 tip.style.left=Math.min(e.clientX+14,innerWidth-tip.offsetWidth-8)+'px';
 tip.style.top=Math.min(e.clientY+14,innerHeight-tip.offsetHeight-8)+'px'});
const NS='http://www.w3.org/2000/svg',palette=['#1f77b4','#ff7f0e','#2ca02c','#d62728','#9467bd','#8c564b','#e377c2'];
function el(p,n,a,t){const e=document.createElementNS(NS,n);for(const k in a)e.setAttribute(k,a[k]);
 if(t!==undefined)e.textContent=t;p.appendChild(e);return e}
function lines(id,series){const s=document.getElementById(id);s.replaceChildren();
 const w=760,h=320,l=46,b=40,n=Math.max(...series.map(r=>r.length),2);s.setAttribute('viewBox','0 0 '+w+' '+h);
 const x=k=>l+k*(w-l-170)/(n-1),y=v=>h-b-Math.max(-.05,Math.min(1.05,v))*(h-b-14);
 for(let v=0;v<=10;v+=2){el(s,'line',{x1:l,x2:x(n-1),y1:y(v/10),y2:y(v/10),stroke:'#ddd'});
  el(s,'text',{x:l-8,y:y(v/10)+4,'text-anchor':'end'},(v/10).toFixed(1))}
 const step=Math.ceil(n/20);
 for(let k=0;k<n;k+=step)el(s,'text',{x:x(k),y:h-b+18,'text-anchor':'middle'},k);
 el(s,'text',{x:(l+x(n-1))/2,y:h-6,'text-anchor':'middle','class':'axis'},'layer');
 series.forEach((r,m)=>{const c=palette[m%palette.length];if(!r.length)return;
  if(D.lower){const up=r.map((p,k)=>x(k)+','+y(D.upper[p[0]][p[1]])),lo=r.map((p,k)=>x(k)+','+y(D.lower[p[0]][p[1]]));
   el(s,'polygon',{points:up.concat(lo.reverse()).join(' '),fill:c,opacity:.18})}
  el(s,'polyline',{points:r.map((p,k)=>x(k)+','+y(D.values[p[0]][p[1]])).join(' '),fill:'none',stroke:c,
   'stroke-width':2});
  r.forEach((p,k)=>el(s,'circle',{cx:x(k),cy:y(D.values[p[0]][p[1]]),r:4,fill:c,'data-i':p[0],'data-j':p[1]}));
  el(s,'rect',{x:w-158,y:16+m*20,width:12,height:12,fill:c});el(s,'text',{x:w-140,y:26+m*20},r.name)})}
function to(t){lines('to',D.models.map(m=>{const r=[];
 for(let k=m.start;k<m.stop;k++)if(D.values[k][t]!==null)r.push([k,t]);
 r.name=m.name;return r}).filter(r=>r.length))}
function next(){lines('next',D.models.map(m=>{const r=[];for(let k=m.start;k+1<m.stop;k++)
 if(D.values[k][k+1]!==null)r.push([k,k+1]);r.name=m.name;return r}).filter(r=>r.length))}
const pick=document.getElementById('pick');D.labels.forEach((n,k)=>pick.add(new Option(n,k)));
pick.onchange=()=>to(+pick.value);pick.value=D.labels.length-1;to(D.labels.length-1);next();
"""


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
) -> Path:
    """Write the report of a result, and of layer weights where there are any, to one HTML file (atomically)."""

    def plain(x: np.ndarray | None) -> list | None:
        return None if x is None else [[None if np.isnan(v) else round(float(v), 6) for v in row] for row in x]

    details = result.details
    counts, options = details["counts"], details["options"]
    data = {
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
    layer_weights = f"<h2>Layer weights of downstream tasks</h2>{_weights(weights)}" if weights else ""
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<table>{rows}</table>
<h2>Heat maps</h2>
<p class="note">Colours run from 0 to 1, layer 0 is at the bottom left. Point at a cell for its value.</p>
<div class="maps">{"".join(maps)}</div>
<h2>Similarity to one layer</h2>
<p><label>layer <select id="pick"></select></label></p><svg id="to" width="760" height="320"></svg>
<h2>Similarity of each layer to the next</h2>
<svg id="next" width="760" height="320"></svg>
{layer_weights}
<h2>Provenance</h2><details><summary>everything that made these numbers</summary><pre>{shown}</pre></details>
<div id="tip"></div>
<script type="application/json" id="data">{blob}</script>
<script>{_SCRIPT}</script>
</body></html>
"""
    return provenance.write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
