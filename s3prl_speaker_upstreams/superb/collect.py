"""One table of all runs, beside published results; layer weights; and the leaderboard's archive."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import shutil
import statistics
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s3prl_speaker_upstreams.common.digests import json_sha256
from s3prl_speaker_upstreams.common.files import write_json, write_text
from s3prl_speaker_upstreams.superb.errors import ScoringError
from s3prl_speaker_upstreams.superb.reference import ROWS, SOURCE, superb_score
from s3prl_speaker_upstreams.superb.tasks import TASKS, Metric

__all__ = ["collect", "pack", "results"]

logger = logging.getLogger(__name__)

_METRICS: dict[str, Metric] = {metric.name: metric for task in TASKS.values() for metric in task.metrics}
_SCORE = "SUPERB score"
_MARK = "*"
_FACTS = ("weights", "feature", "normalize", "seeds", "not stock", "s3prl", "stack")

Result = dict[str, Any]


def results(exp: str | Path) -> list[Result]:
    """All scored runs below `exp`, each ``result.json`` with its folder as "folder"."""
    files = sorted([*Path(exp).glob("*/*/result.json"), *Path(exp).glob("*/*/seed*/result.json")])
    found = []
    for file in files:
        result = {"folder": str(file.parent), **json.loads(file.read_text())}
        result.setdefault("label", result["upstream"])  # written by an earlier version
        found.append(result)
    return found


@dataclass(frozen=True)
class _Row:
    """One line of the table: what stands before the numbers, metric -> (mean, deviation over seeds or None), facts."""

    upstream: str
    values: Mapping[str, tuple[float, float | None]]
    score: float | None
    marked: frozenset[str]
    facts: Mapping[str, str]
    source: str
    details: Sequence[str] = field(default_factory=tuple)

    def cell(self, column: str) -> str:
        """A number as tables show it; numbers that are not stock carry a mark."""
        if column == _SCORE:
            return "" if self.score is None else f"{self.score:.2f}{_MARK if self.marked else ''}"
        if column not in self.values:
            return ""
        mean, deviation = self.values[column]
        spread = "" if deviation is None else f" ± {deviation:.2f}"
        return f"{mean:.2f}{spread}{_MARK if column in self.marked else ''}"


def _who(result: Result) -> str:
    """What one row of the table is about: label and upstream, by content."""
    weights = result.get("weights", {})
    parts = [result["label"], result["upstream"], weights.get("file"), weights.get("state")]
    parts += [result.get("model_config", {}).get("content"), result.get("feature"), result.get("normalize")]
    return json_sha256(parts)


def _how(result: Result) -> str:
    """What seeds of one task must share to be averaged: everything that made them but the seed and the choice."""
    config = {k: v for k, v in result.get("config", {}).items() if k not in ("optimizer.lr",)}
    keys = ("corpus_sha256", "prepared_sha256", "s3prl", "not_stock", "accepted")
    places = {key for key, value in config.items() if isinstance(value, str) and "/" in value}
    kept = {key: value for key, value in config.items() if key not in places and "num_workers" not in key}
    kept = {key: value for key, value in kept.items() if not isinstance(value, list) or "lexicon" not in key}
    return json_sha256([kept, *(result.get(key) for key in keys)])


def _reasons(result: Result) -> list[str]:
    if "not_stock" in result:
        return result["not_stock"]
    # its "stock" looked at --set and --smoke only: another yaml or a part of the corpus went unnoticed
    return ["made by a version that kept no settings; run its stages again, which trains nothing anew"]


def _rows(found: Sequence[Result], reference: bool) -> list[_Row]:
    grouped: dict[str, dict[str, dict[str, list[Result]]]] = {}
    for result in found:
        grouped.setdefault(_who(result), {}).setdefault(result["task"], {}).setdefault(_how(result), []).append(result)
    labels = [next(iter(next(iter(tasks.values())).values()))[0]["label"] for tasks in grouped.values()]
    rows = []
    for label, tasks in zip(labels, grouped.values(), strict=True):
        # one task made in several ways (other settings, another corpus) takes several rows: nothing is mixed
        variants = {
            task: sorted(ways.values(), key=lambda group: (len(_reasons(group[0])), group[0]["folder"]))
            for task, ways in tasks.items()
        }
        for index in range(max(map(len, variants.values()))):
            own = {task: groups[index] for task, groups in variants.items() if index < len(groups)}
            name = label
            if labels.count(label) > 1:
                name += f" ({_weights(next(iter(own.values()))[0])})"
            rows.append(_row(f"{name} [{index + 1}]" if index else name, own))
    if reference:
        for upstream, columns in ROWS.items():
            values = {n: (columns[m.leaderboard], None) for n, m in _METRICS.items() if m.leaderboard in columns}
            rows.append(_Row(upstream, values, _score(values), frozenset(), {}, SOURCE))
    return rows


def _weights(result: Result) -> str:
    weights = result.get("weights")
    if weights is None:
        return "not recorded"
    digest = (weights.get("file") or "").removeprefix("sha256:") or weights.get("state") or ""
    return digest[:12] if digest else "none"


def _score(values: Mapping[str, tuple[float, float | None]]) -> float | None:
    return superb_score({_METRICS[name].leaderboard: value for name, (value, _) in values.items()})


def _row(name: str, tasks: Mapping[str, list[Result]]) -> _Row:
    values: dict[str, tuple[float, float | None]] = {}
    marked, details = set(), []
    for task, group in tasks.items():
        for metric in group[0]["metrics"]:
            numbers = [result["metrics"][metric] for result in group]
            deviation = statistics.stdev(numbers) if len(numbers) > 1 else None
            values[metric] = (statistics.fmean(numbers), deviation)
            if _reasons(group[0]):
                marked.add(metric)
        details.append(_detail(task, group))
    first = [result for group in tasks.values() for result in group]
    reasons = dict.fromkeys(f"{task}: {reason}" for task, group in tasks.items() for reason in _reasons(group[0]))
    facts = {
        "weights": _joined(_weights(result) for result in first),
        "feature": _joined(str(result.get("feature", "not recorded")) for result in first),
        "normalize": _joined(str(result.get("normalize", "not recorded")) for result in first),
        "seeds": _joined(str(result["seed"]) for result in first),
        "not stock": "; ".join(reasons),
        "s3prl": _joined(_s3prl(result) for result in first),
        "stack": _joined(f"torch {result['versions'].get('torch', '?')}" for result in first),
    }
    upstream = _joined(str(result["upstream"]) for result in first)
    about = [f"-s {facts['feature']}", *(["normalised"] if "True" in facts["normalize"] else [])]
    source = (
        f"this run: -u {upstream}, weights {facts['weights']}, {', '.join(about)}, seed {facts['seeds']}, "
        f"s3prl {facts['s3prl']}, {facts['stack']}"
    )
    if reasons:
        source += f"; {_MARK} not stock hyperparameters: {facts['not stock']}"
    return _Row(name, values, _score(values), frozenset(marked), facts, source, details)


def _s3prl(result: Result) -> str:
    own = result.get("s3prl") or {"version": result["versions"].get("s3prl", "?")}
    return f"{own['version']}{'@' + own['revision'][:16] if own.get('revision') else ''}"


def _joined(texts: Any) -> str:
    return ", ".join(sorted(dict.fromkeys(texts)))


def _detail(task: str, group: Sequence[Result]) -> str:
    lrs = _joined(f"{result['lr']:g}" for result in group if result.get("lr") is not None)
    corpus = _joined(str(result.get("corpus_sha256", "?"))[:8] for result in group)
    return f"{task}: {len(group)} seed{'s' * (len(group) > 1)}, lr {lrs or '-'}, corpus {corpus}"


def _head(name: str) -> str:
    return name + (" ↑" if name in _METRICS and _METRICS[name].higher else " ↓" if name in _METRICS else "")


def _text(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([["" if value is None else value for value in row] for row in rows])
    return out.getvalue()


def _csv(rows: Sequence[_Row], used: Sequence[str]) -> str:
    spread = [name for name in used if any(row.values.get(name, (0, None))[1] is not None for row in rows)]
    columns = ["upstream", *used, _SCORE, *(f"{name} deviation" for name in spread), *_FACTS, "source"]
    body = []
    for row in rows:
        numbers = [row.values[name][0] if name in row.values else None for name in used]
        deviations = [row.values.get(name, (0, None))[1] for name in spread]
        facts = [row.facts.get(name) for name in _FACTS]
        body.append([row.upstream, *numbers, row.score, *deviations, *facts, row.source])
    return _text(columns, body)


def _runs_csv(found: Sequence[Result]) -> str:
    """Every number with all that made it, one line each."""
    columns = ["label", "task", "metric", "value", "stock", "not stock", "upstream", "weights file", "weights state"]
    columns += ["model config", "feature", "normalize", "layers", "seed", "lr", "settings", "corpus", "s3prl"]
    columns += ["torch", "python", "folder"]
    body = []
    for result in found:
        weights = result.get("weights", {})
        for metric, value in result["metrics"].items():
            reasons = _reasons(result)
            row = [result["label"], result["task"], metric, value, not reasons, "; ".join(reasons), result["upstream"]]
            row += [weights.get("file"), weights.get("state"), result.get("model_config", {}).get("content")]
            row += [result.get("feature"), result.get("normalize"), result.get("layers"), result["seed"]]
            row += [result.get("lr"), json.dumps(result.get("settings", {})), result.get("corpus_sha256")]
            row += [_s3prl(result), result["versions"].get("torch"), result["versions"].get("python")]
            body.append([*row, result["folder"]])
    return _text(columns, body)


def _markdown(rows: Sequence[_Row], used: Sequence[str]) -> str:
    sources = list(dict.fromkeys(row.source for row in rows))
    shown = [*used, _SCORE]
    lines = [f"| upstream | {' | '.join(map(_head, shown))} | source |", f"|{'---|' * (len(shown) + 2)}"]
    for row in rows:
        cells = [row.upstream, *(row.cell(column) for column in shown)]
        lines.append(f"| {' | '.join(cells)} | [{sources.index(row.source) + 1}] |")
    notes = []
    for number, source in enumerate(sources, 1):
        details = list(dict.fromkeys(detail for row in rows if row.source == source for detail in row.details))
        notes.append(f"[{number}] {source}{' (' + '; '.join(details) + ')' if details else ''}  ")
    return "\n".join([*lines, "", *notes, "", _FOOT]) + "\n"


_FOOT = (
    "PER, WER, EER, DER, slot CER, accuracies, F1, MTWV and STOI in per cent; PESQ as it is; SI-SDRi in dB. The SUPERB "
    "score is the leaderboard's over the ten tasks of arXiv 2105.01051 (mean over tasks of 1000 (value - FBANK) / "
    "(best - FBANK) with the reference points of superbbenchmark/website-react); empty where a task is missing. "
    f"Several seeds: mean ± standard deviation. {_MARK} marks numbers that were not made with the benchmark's "
    "configuration on its whole corpus: they do not compare with published ones."
)


def _latex(rows: Sequence[_Row], used: Sequence[str]) -> str:
    shown = [*used, _SCORE]
    escape = str.maketrans({"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "±": r"$\pm$"})
    arrows = {True: r" $\uparrow$", False: r" $\downarrow$"}
    heads = [name.translate(escape) + (arrows[_METRICS[name].higher] if name in _METRICS else "") for name in shown]
    lines = [rf"\begin{{tabular}}{{l{'r' * len(shown)}}}", r"\hline", " & ".join(["upstream", *heads]) + r" \\"]
    lines.append(r"\hline")
    for row in rows:
        cells = [row.upstream.translate(escape), *(row.cell(c).translate(escape) or "--" for c in shown)]
        lines.append(" & ".join(cells) + r" \\")
    lines.append(r"\hline")
    if any(row.marked for row in rows):
        note = f"{_MARK} not the benchmark's configuration or not its whole corpus"
        lines.append(rf"\multicolumn{{{len(shown) + 1}}}{{l}}{{{note}}} \\")
    sources = dict.fromkeys(row.source for row in rows)
    return "\n".join([*(f"% {source}" for source in sources), *lines, r"\end{tabular}"]) + "\n"


def collect(exp: str | Path, out: str | Path, *, reference: bool = True) -> list[Path]:
    """Write ``superb.csv``, ``superb.md``, ``superb.tex``, ``runs.csv`` and the list of checkpoints with layer weights.

    One row is one upstream by content (weights, -g, feature, normalisation), its numbers means over seeds. Runs of one
    task that were made in different ways never share a row.

    Parameters
    ----------
    exp : folder of the runs
    out : folder to write into
    reference : whether to put published rows below, each with its source

    Returns
    -------
    The files written; ``runs.csv`` has a line for each number with all that made it; ``layer_weights.json`` maps a
    label "upstream TASK" to the chosen checkpoint (ER: of fold1), whose "Featurizer" entry holds the weights that
    ``cka-addon layer-weights CHECKPOINT...`` reads. Upstreams of one layer, such as fbank, have no weights and are left
    out

    Raises
    ------
    ScoringError if there is no scored run
    """
    exp, out = Path(exp), Path(out)
    found = results(exp)
    if not found:
        raise ScoringError(f"{exp}: no result.json below it; run the score stage of some task first")
    rows = _rows(found, reference)
    # columns that nobody here has run are left out, unless the score needs them
    used = [name for name in _METRICS if any(name in row.values for row in rows if row.source != SOURCE)]
    files = [
        write_text(out / "superb.csv", _csv(rows, used)),
        write_text(out / "superb.md", _markdown(rows, used)),
        write_text(out / "superb.tex", _latex(rows, used)),
        write_text(out / "runs.csv", _runs_csv(found)),
    ]
    weights: dict[str, str] = {}
    for result in found:
        if result["checkpoints"] and result["layers"] != 1:
            label = f"{result['label']} {result['task']}"
            weights[f"{label} seed{result['seed']}" if label in weights else label] = result["checkpoints"][0]
    files.append(write_json(out / "layer_weights.json", weights))
    count = len({result["label"] for result in found})
    logger.info("collect: %d upstreams, wrote %s", count, ", ".join(map(str, files)))
    return files


def pack(exp: str | Path, upstream: str, out: str | Path, *, seed: int | None = None) -> Path:
    """Put one upstream's predictions into ``predict/`` and ``predict.zip`` as the SUPERB leaderboard takes them.

    The layout is that of s3prl's ``submit/submit.py``: a folder for each task, ``predict/pr_public/predict.ark`` and so
    on. Tasks without a result are left out, which the leaderboard allows (ER counts with all five folds only).

    Raises
    ------
    ScoringError if the upstream has no result, several of one task (give `seed`), or a prediction file is gone
    """
    exp, out = Path(exp), Path(out)
    found = results(exp)
    own: dict[str, Result] = {}
    for result in found:
        if result["label"] == upstream and seed in (None, result["seed"]):
            if result["task"] in own:
                seeds = sorted(r["seed"] for r in found if (r["label"], r["task"]) == (upstream, result["task"]))
                raise ScoringError(f"{exp}: {upstream} has {result['task']} with the seeds {seeds}; give one (--seed)")
            own[result["task"]] = result
    if not own:
        there = sorted({result["label"] for result in found})
        of_seed = "" if seed is None else f" with seed {seed}"
        raise ScoringError(
            f"{exp}: no result of {upstream!r}{of_seed}; there are results of {', '.join(there) or 'nothing'}"
        )
    for name, result in own.items():
        if _reasons(result):
            logger.warning("pack: %s is not stock (%s)", name, "; ".join(_reasons(result)))
    beside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    for name, result in own.items():
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
    logger.info("pack: %s of %s in %s", ", ".join(own), upstream, out / "predict.zip")
    return out / "predict.zip"
