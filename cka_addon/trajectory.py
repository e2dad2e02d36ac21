"""How layers change while a model is trained: similarity of every checkpoint's layers to those of the last and first.

cka-addon trajectory "s3prl:ecapa_dino_local ckpt={}" RUN/step_*.pt -a wavs/ --mode full -o trajectory/
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cka_addon import provenance
from cka_addon.errors import SpecError
from cka_addon.result import CKAResult

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


def specifications(template: str, checkpoints: Sequence[str | Path]) -> list[str]:
    """One model per checkpoint, in the order of the numbers in their names. template : a model with {} for the file.

    >>> specifications("s3prl:x ckpt={}", ["run/step_20.pt", "run/step_3.pt"])
    ["step_3=s3prl:x ckpt='run/step_3.pt'", "step_20=s3prl:x ckpt='run/step_20.pt'"]
    """
    if "{}" not in template:
        raise SpecError(f"got model '{template}'; expected one with {{}} where the checkpoint goes: ckpt={{}}")
    if len(checkpoints) < 2:
        raise SpecError(f"got {len(checkpoints)} checkpoint; a trajectory needs at least two")

    def order(path: str | Path) -> tuple[list[int], str]:
        return [int(n) for n in re.findall(r"\d+", Path(path).stem)], str(path)

    names = [re.sub(r"[^A-Za-z0-9_.+-]+", "_", Path(p).stem) for p in sorted(checkpoints, key=order)]
    files = [str(p) for p in sorted(checkpoints, key=order)]
    if len(set(names)) < len(names):
        raise SpecError(f"two checkpoints are called '{max(names, key=names.count)}'; expected different file names")
    return [f"{name}=" + template.replace("{}", f"'{file}'") for name, file in zip(names, files, strict=True)]


def table(result: CKAResult) -> pandas.DataFrame:
    """One row per layer and checkpoint: similarity to that layer of the last and of the first checkpoint."""
    import pandas

    rows = []
    first, last = result.names[0], result.names[-1]
    for layer in result.layers(last):
        for name in result.names:
            here = result.find(f"{name}/{layer}")
            row: dict[str, object] = {"layer": layer, "checkpoint": name}
            for what, other in (("last", last), ("first", first)):
                there = result.find(f"{other}/{layer}")
                row[f"to_{what}"] = result.values[here, there]
                if result.lower is not None and result.upper is not None:
                    row |= {
                        f"to_{what}_lower": result.lower[here, there],
                        f"to_{what}_upper": result.upper[here, there],
                    }
            rows.append(row)
    return pandas.DataFrame(rows)


def plot(result: CKAResult) -> Figure:
    """Lines over checkpoints, one per layer, with the intervals as bands."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    data = table(result)
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for ax, what in zip(figure.subplots(1, 2, sharey=True), ("last", "first"), strict=True):
        for layer, part in data.groupby("layer", sort=False):
            x = np.arange(len(part))
            (line,) = ax.plot(x, part[f"to_{what}"], marker="o", markersize=4, label=str(layer))
            if f"to_{what}_lower" in part:
                ax.fill_between(
                    x, part[f"to_{what}_lower"], part[f"to_{what}_upper"], color=line.get_color(), alpha=0.2, lw=0
                )
        ax.set_xticks(x, list(part["checkpoint"]), rotation=45, ha="right", fontsize=8)
        ax.set_title(f"CKA with the same layer of the {what} checkpoint", fontsize=10)
        ax.set_ylim(-0.02, 1.02)
        ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8)
    return figure


def write(result: CKAResult, out: str | Path, formats: Sequence[str] = ("png", "pdf")) -> list[Path]:
    """Result, table and picture of a trajectory."""
    from cka_addon import plots

    folder, data = Path(out), table(result)
    written = [result.save(folder / "trajectory.json")]
    written.append(
        provenance.write_atomically(folder / "trajectory.csv", lambda temporary: data.to_csv(temporary, index=False))
    )
    return written + plots.save(plot(result), folder / "trajectory", formats)
