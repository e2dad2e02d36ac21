"""What recipes/fusion/run.sh needs beside the runs: the control, and a table with intervals and verdicts.

python recipes/fusion/compare.py prepare --speech wavlm_base_plus --speaker ecapa_dino_small --exp exp/fusion
python recipes/fusion/compare.py table --exp exp/fusion
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

TAGS = ("speech", "speaker", "fused", "control")


def prepare(speech: str, speaker: str, exp: Path) -> None:
    """Write speaker.yaml, fused.yaml and control.yaml below ``exp``, and the untrained network of the last."""
    import dataclasses

    import torch

    from s3prl_speaker_upstreams import checkpoints, weights
    from s3prl_speaker_upstreams.ecapa import Ecapa, Frontend

    exp.mkdir(parents=True, exist_ok=True)
    named = not Path(speaker).exists()
    options = {}
    if named and (entry := weights.REGISTRY[speaker]).frontend:
        options["frontend"] = entry.frontend
    trained = checkpoints.read_checkpoint(weights.resolve(speaker) if named else speaker, **options)
    if not (exp / "untrained.safetensors").is_file():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            state = Ecapa(trained.ecapa).state_dict()
        buffers = (
            Frontend(trained.frontend).own_tensors() if trained.frontend.kind == "wave" else trained.frontend_buffers
        )
        provenance = {"training_data": "none: random weights, seed 0", "architecture_of": speaker}
        random = dataclasses.replace(
            trained, state=state, role="untrained", provenance=provenance, frontend_buffers=buffers
        )
        checkpoints.save_native(random, exp / "untrained.safetensors")
    own = {"upstream": speaker} if named else {"upstream": "ecapa_tdnn_local", "ckpt": str(Path(speaker).resolve())}
    own["name"] = "speaker"
    control = {"upstream": "ecapa_tdnn_local", "ckpt": "untrained.safetensors", "name": "speaker"}
    first = {"upstream": speech, "name": "speech"}
    for name, members in (("speaker", [own]), ("fused", [first, own]), ("control", [first, control])):
        (exp / f"{name}.yaml").write_text(json.dumps({"members": members}, indent=1) + "\n", encoding="utf-8")


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean and half width of its 95 % interval by Student's t; None for a single value."""
    from scipy import stats

    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))


def shown(mean: float, half: float | None) -> str:
    return f"{mean:.2f}" if half is None else f"{mean:.2f} ± {half:.2f}"


def verdict(task: str, runs: dict[str, dict[int, float]], higher: bool) -> str:
    """One sentence: the fusion against the better member and against the control, by differences of equal seeds."""
    if not all(runs.get(tag) for tag in TAGS):
        return f"{task}: not all of {', '.join(TAGS)} have been run."
    sign = 1 if higher else -1
    best = max(("speech", "speaker"), key=lambda tag: sign * interval(list(runs[tag].values()))[0])

    def gain(tag: str) -> tuple[float, float | None]:
        seeds = sorted(runs["fused"].keys() & runs[tag].keys())
        return interval([sign * (runs["fused"][seed] - runs[tag][seed]) for seed in seeds])

    over_best, over_control = gain(best), gain("control")
    if over_best[1] is None or over_control[1] is None:
        return (
            f"{task}: one seed decides nothing; the fusion is {shown(*over_best)} better than the {best} model alone "
            f"and {shown(*over_control)} better than with an untrained speaker model."
        )
    beats_best, beats_control = (mean - half > 0 for mean, half in (over_best, over_control))  # type: ignore[operator]
    what = {
        (True, True): "the speaker model's knowledge helps",
        (True, False): "the fusion helps, but so may its width alone",
        (False, True): "it is better than its width alone explains, but not surely better than one model",
        (False, False): "no gain that these seeds can show",
    }[beats_best, beats_control]
    return (
        f"{task}: {what}: fused against the {best} model alone {shown(*over_best)}, against the untrained control "
        f"{shown(*over_control)} (positive is better, 95 % intervals over {len(runs['fused'])} seeds)."
    )


def table(exp: Path) -> None:
    """Write fusion.md and fusion.json below ``exp`` from the runs' result.json."""
    from s3prl_speaker_upstreams.common.files import write_json, write_text
    from s3prl_speaker_upstreams.superb.tasks import TASKS

    found: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for tag in TAGS:
        for file in sorted([*exp.glob(f"{tag}/*/result.json"), *exp.glob(f"{tag}/*/seed*/result.json")]):
            result = json.loads(file.read_text(encoding="utf-8"))
            metric = TASKS[result["task"]].metrics[0]
            found[result["task"]][tag][int(result["seed"])] = float(result["metrics"][metric.name])
    if not found:
        sys.exit(f"{exp}: no result.json of speech, speaker, fused or control; run the stage `runs` first")
    rows, sentences, data = [], [], {}
    for task, runs in found.items():
        metric = TASKS[task].metrics[0]
        cells = [shown(*interval(list(runs[tag].values()))) if runs.get(tag) else "-" for tag in TAGS]
        rows.append(f"| {metric.name} ({'higher' if metric.higher else 'lower'} is better) | {' | '.join(cells)} |")
        sentences.append("- " + verdict(task, runs, metric.higher))
        data[task] = {"metric": metric.name, "higher": metric.higher, "runs": {t: dict(r) for t, r in runs.items()}}
        data[task]["verdict"] = sentences[-1][2:]
    head = "| task | speech model | speaker model | fused | fused, speaker model untrained |\n|---|---|---|---|---|\n"
    text = head + "\n".join(rows) + "\n\n" + "\n".join(sentences) + "\n"
    write_text(exp / "fusion.md", text)
    write_json(exp / "fusion.json", data)
    sys.stdout.write(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("prepare", help="write the control and the fusions' files")
    verb.add_argument("--speech", required=True, help="an upstream of s3prl")
    verb.add_argument("--speaker", required=True, help="a named entry, or a checkpoint's path")
    verb.add_argument("--exp", required=True, type=Path)
    verb = verbs.add_parser("table", help="compare what has been run")
    verb.add_argument("--exp", required=True, type=Path)
    args = parser.parse_args(argv)
    if args.verb == "prepare":
        prepare(args.speech, args.speaker, args.exp)
    else:
        table(args.exp)
    return 0


if __name__ == "__main__":
    sys.exit(main())
