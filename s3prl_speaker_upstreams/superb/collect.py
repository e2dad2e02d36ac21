"""One table of all runs, beside published results; layer weights; and the leaderboard's archive."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

from s3prl_speaker_upstreams.superb.audio import write_text
from s3prl_speaker_upstreams.superb.errors import ScoringError
from s3prl_speaker_upstreams.superb.reference import ROWS, SOURCE, superb_score
from s3prl_speaker_upstreams.superb.tasks import TASKS, Metric

__all__ = ["collect", "pack", "results"]

logger = logging.getLogger(__name__)

_METRICS: dict[str, tuple[str, Metric]] = {m.name: (t.name, m) for t in TASKS.values() for m in t.metrics}
_SCORE = "SUPERB score"


def results(exp: str | Path) -> dict[str, dict[str, dict]]:
    """upstream -> task -> its ``result.json``, of all scored runs below `exp`."""
    found: dict[str, dict[str, dict]] = {}
    for file in sorted(Path(exp).glob("*/*/result.json")):
        result = json.loads(file.read_text())
        found.setdefault(result["upstream"], {})[result["task"]] = result
    return found


def _table(exp: Path, reference: bool) -> list[dict[str, str | float | None]]:
    rows = []
    for upstream, tasks in results(exp).items():
        values = {name: value for result in tasks.values() for name, value in result["metrics"].items()}
        stock = all(result["stock"] for result in tasks.values())
        rows.append(_row(upstream, values, "this run" if stock else "this run, not stock hyperparameters"))
    if reference:
        for upstream, columns in ROWS.items():
            values = {name: columns[m.leaderboard] for name, (_, m) in _METRICS.items() if m.leaderboard in columns}
            rows.append(_row(upstream, values, SOURCE))
    return rows


def _row(upstream: str, values: Mapping[str, float], source: str) -> dict[str, str | float | None]:
    score = superb_score({_METRICS[name][1].leaderboard: value for name, value in values.items()})
    return {"upstream": upstream, **{name: values.get(name) for name in _METRICS}, _SCORE: score, "source": source}


def _shown(value: str | float | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.2f}"


def _head(name: str) -> str:
    return name + (" ↑" if name in _METRICS and _METRICS[name][1].higher else " ↓" if name in _METRICS else "")


def _csv(rows: list[dict], columns: list[str]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([["" if row[c] is None else row[c] for c in columns] for row in rows])
    return out.getvalue()


def _markdown(rows: list[dict], columns: list[str]) -> str:
    sources = sorted({row["source"] for row in rows})
    shown = [column for column in columns if column != "source"]
    lines = [f"| {' | '.join(map(_head, shown))} | source |", f"|{'---|' * (len(shown) + 1)}"]
    for row in rows:
        cells = [_shown(row[column]) for column in shown]
        lines.append(f"| {' | '.join(cells)} | [{sources.index(row['source']) + 1}] |")
    notes = [f"[{number}] {source}" for number, source in enumerate(sources, 1)]
    return "\n".join([*lines, "", *(f"{note}  " for note in notes), "", _FOOT]) + "\n"


_FOOT = (
    "PER, WER, EER, DER, slot CER, accuracies, F1, MTWV and STOI in per cent; PESQ as it is; SI-SDRi in dB. The SUPERB "
    "score is the leaderboard's over the ten tasks of arXiv 2105.01051 (mean over tasks of 1000 (value - FBANK) / "
    "(best - FBANK) with the reference points of superbbenchmark/website-react); empty where a task is missing."
)


def _latex(rows: list[dict], columns: list[str]) -> str:
    shown = [column for column in columns if column != "source"]
    escape = str.maketrans({"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#"})
    arrows = {True: r" $\uparrow$", False: r" $\downarrow$"}
    heads = [name.translate(escape) + (arrows[_METRICS[name][1].higher] if name in _METRICS else "") for name in shown]
    lines = [rf"\begin{{tabular}}{{l{'r' * (len(shown) - 1)}}}", r"\hline", " & ".join(heads) + r" \\", r"\hline"]
    lines += [" & ".join(_shown(row[c]).translate(escape) or "--" for c in shown) + r" \\" for row in rows]
    sources = sorted({row["source"] for row in rows})
    return "\n".join([*(f"% {s}" for s in sources), *lines, r"\hline", r"\end{tabular}"]) + "\n"


def collect(exp: str | Path, out: str | Path, *, reference: bool = True) -> list[Path]:
    """Write ``superb.csv``, ``superb.md``, ``superb.tex`` and the list of checkpoints with layer weights.

    Parameters
    ----------
    exp : folder of the runs
    out : folder to write into
    reference : whether to put published rows below, each with its source

    Returns
    -------
    The files written; ``layer_weights.json`` maps a label "upstream TASK" to the chosen checkpoint (ER: of fold1),
    whose "Featurizer" entry holds the weights that ``cka-addon layer-weights CHECKPOINT...`` reads. Upstreams of one
    layer, such as fbank, have no weights and are left out

    Raises
    ------
    ScoringError if there is no scored run
    """
    exp, out = Path(exp), Path(out)
    found = results(exp)
    if not found:
        raise ScoringError(f"{exp}: no result.json below it; run the score stage of some task first")
    rows = _table(exp, reference)
    # columns that nobody here has run are left out, unless the score needs them
    used = [name for name in _METRICS if any(row[name] is not None for row in rows if row["source"] != SOURCE)]
    columns = ["upstream", *used, _SCORE, "source"]
    files = [
        write_text(out / "superb.csv", _csv(rows, columns)),
        write_text(out / "superb.md", _markdown(rows, columns)),
        write_text(out / "superb.tex", _latex(rows, columns)),
    ]
    weights = {
        f"{upstream} {task}": result["checkpoints"][0]
        for upstream, tasks in found.items()
        for task, result in tasks.items()
        if result["checkpoints"] and result["layers"] != 1
    }
    files.append(write_text(out / "layer_weights.json", json.dumps(weights, indent=1) + "\n"))
    logger.info("collect: %d upstreams, wrote %s", len(found), ", ".join(map(str, files)))
    return files


def pack(exp: str | Path, upstream: str, out: str | Path) -> Path:
    """Put one upstream's predictions into ``predict/`` and ``predict.zip`` as the SUPERB leaderboard takes them.

    The layout is that of s3prl's ``submit/submit.py``: a folder for each task, ``predict/pr_public/predict.ark`` and so
    on. Tasks without a result are left out, which the leaderboard allows (ER counts with all five folds only).

    Raises
    ------
    ScoringError if the upstream has no result, or a prediction file is gone
    """
    exp, out = Path(exp), Path(out)
    found = results(exp)
    if upstream not in found:
        raise ScoringError(f"{exp}: no result of {upstream!r}; there are results of {', '.join(found) or 'nothing'}")
    beside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    for name, result in found[upstream].items():
        home = Path(result["predictions"])
        for source, target in TASKS[name].predictions:
            place = beside / "predict" / target
            place.parent.mkdir(parents=True, exist_ok=True)
            if (home / source).is_dir():
                shutil.copytree(home / source, place)
            elif (home / source).is_file():
                shutil.copyfile(home / source, place)
            else:
                shutil.rmtree(beside, ignore_errors=True)
                raise ScoringError(f"{home / source} is gone; run the evaluate stage of {name} again with --force")
    archive = beside / "predict.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted((beside / "predict").rglob("*")):
            if path.is_file():
                file.write(path, path.relative_to(beside))
    shutil.rmtree(out, ignore_errors=True)
    os.replace(beside, out)
    logger.info("pack: %s of %s in %s", ", ".join(found[upstream]), upstream, out / "predict.zip")
    return out / "predict.zip"
