"""The command `cka-addon`: dump, compute, merge, plot, report, layer-weights, probe, info, verify."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cka_addon.config import add_arguments, from_args
from cka_addon.options import DumpOptions, Inputs, Options
from cka_addon.probe import cli as probe_cli
from cka_addon.spec import SPEC_HELP

logger = logging.getLogger("cka_addon")

_RUNNING = ("model", "audio", "limit", "skip_unreadable", "device", "shard")
_MODEL_HELP = "models:\n" + textwrap.indent(SPEC_HELP, "  ")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cka-addon",
        description="Layer-wise similarity (linear CKA) within and across speech models.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
first steps:
  cka-addon compute -m fbank -m "base=s3prl:wavlm_local ckpt=WavLM-Base.pt" -a wavs/ -o result.json
  cka-addon plot result.json -o figures/
  cka-addon report result.json -o report.html
""",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bars, warnings only")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, epilog: str = "") -> argparse.ArgumentParser:
        p = commands.add_parser(
            name, help=text, description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        # Also behind the command, where most people write it.
        p.add_argument("-q", "--quiet", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return p

    p = add(
        "dump",
        "Write the layers of models for a list of recordings to a feature store; resumes if stopped.",
        _MODEL_HELP + "\nexample:\n  cka-addon dump -m fbank -m wavlm_base_plus -a wavs/ -o store/ --dtype float16\n",
    )
    add_arguments(p, Inputs, only=_RUNNING, required=("model", "audio"))
    p.add_argument("-o", "--out", required=True, metavar="STORE", help="folder of the store")
    add_arguments(p, DumpOptions)
    p.add_argument("--dry-run", action="store_true", help="only show how large the store would become")

    p = add(
        "compute",
        "Compute CKA of all layers, from models and recordings or from feature stores.",
        _MODEL_HELP
        + """
examples:
  cka-addon compute -m fbank -m wavlm_base -a wavs/ -o result.json
  cka-addon compute --store store/ --mode full --permutations 1 -o result.json
  torchrun --nproc_per_node 4 -m cka_addon compute --store store/ --mode full -o result.json
  cka-addon compute --store store/ --shard 1/8 -o part1.safetensors     (then: cka-addon merge part*.safetensors)
""",
    )
    add_arguments(p, Inputs)
    p.add_argument(
        "-o",
        "--out",
        required=True,
        metavar="FILE",
        help="result (.json; FILE.csv with provenance is written beside it), or with --shard the part",
    )
    p.add_argument("--parquet", action="store_true", help="also write FILE.parquet")
    add_arguments(p, Options)
    p.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="FILE:COLUMN=VALUE",
        help="only these recordings; repeat for more",
    )
    p.add_argument(
        "--within",
        metavar="FILE:COLUMN",
        help="take the mean of each group away from every layer (path:speaker: is what layers share only the speaker?)",
    )

    p = add(
        "merge",
        "Join the shards of one compute (to a result) or of one dump (to a store).",
        "examples:\n  cka-addon merge part*.safetensors -o result.json\n  cka-addon merge store1/ store2/ -o store/\n",
    )
    p.add_argument(
        "parts", nargs="+", metavar="PART", help="all shards: files of compute --shard, or stores of dump --shard"
    )
    p.add_argument("-o", "--out", required=True, metavar="PATH", help="result (.json) or store")
    p.add_argument("--parquet", action="store_true", help="also write a .parquet table")

    p = add(
        "compare",
        "Is one similarity larger than another? Differences with intervals, paired over the same utterances.",
        """\
examples:
  cka-addon compare result.json wavlm/11,dino/block_1 wavlm/11,dino/block_4
  cka-addon compare before.json after.json wavlm/3,wavlm/11
  cka-addon compare minibatch.json full.json
""",
    )
    p.add_argument("results", nargs="+", metavar="RESULT|PAIR", help="one or two results, then pairs of layers")
    p.add_argument("--measure", default="cka", help="which measure of the results (default cka)")
    p.add_argument("--confidence", type=float, default=0.95, help="of the intervals (default 0.95)")
    p.add_argument("-o", "--out", metavar="FILE", help="also write the differences as CSV")

    p = add(
        "trajectory",
        "How layers change in training: checkpoints of one run against the last and the first.",
        'example:\n  cka-addon trajectory "s3prl:ecapa_dino_local ckpt={}" RUN/*.pt -a wavs/ --mode full -o traj/\n',
    )
    p.add_argument("template", metavar="MODEL", help="the model with {} where the checkpoint goes")
    p.add_argument("checkpoints", nargs="+", metavar="CKPT", help="checkpoints; ordered by the numbers in their names")
    add_arguments(p, Inputs, only=("audio", "limit", "skip_unreadable", "device"), required=("audio",))
    p.add_argument("-o", "--out", required=True, metavar="FOLDER", help="where result, table and picture go")
    p.add_argument("--formats", default="png,pdf", help="endings, with commas (default png,pdf)")
    add_arguments(p, Options)

    p = add(
        "plot",
        "Draw a result: heat map of every model and pair, the grid of all, lines. PNG and PDF, with CSV.",
        "example:\n  cka-addon plot result.json -o figures/ --to dino/block_4\n",
    )
    p.add_argument("result", metavar="RESULT", help="file of compute or merge")
    p.add_argument("-o", "--out", required=True, metavar="FOLDER", help="where the pictures go")
    p.add_argument("--models", metavar="A,B", help="only these models, in this order")
    p.add_argument("--measure", default="cka", help="which measure of the result (default cka)")
    p.add_argument(
        "--to",
        action="append",
        default=[],
        metavar="MODEL/LAYER",
        help="lines: similarity of all layers to this one; repeat for more",
    )
    p.add_argument("--formats", default="png,pdf", help="endings, with commas (default png,pdf)")

    p = add(
        "layer-weights",
        "Which layers SUPERB tasks lean on, from s3prl run_downstream checkpoints.",
        """\
The weights alone mislead when layers differ in norm: give recordings (-m and -a) or a store, and the shares are also
shown corrected, w * norm / sum(w * norm).

example:
  cka-addon layer-weights PR=result/pr/states-1000.ckpt SID=result/sid -m wavlm_base -a wavs/ -o weights/
""",
    )
    p.add_argument("checkpoints", nargs="+", metavar="[TASK=]PATH", help="checkpoints or experiment folders")
    p.add_argument("-o", "--out", required=True, metavar="FOLDER", help="where table and pictures go")
    p.add_argument(
        "-m", "--model", metavar="MODEL", help="the upstream, to measure its layers' norms (see compute --help)"
    )
    p.add_argument("-a", "--audio", metavar="PATH", help="recordings to measure them on")
    p.add_argument("--store", metavar="STORE", help="or a feature store of the upstream")
    p.add_argument(
        "--other-model",
        action="store_true",
        help="take the norms although the model's name or checkpoint is not the one the tasks were trained with",
    )
    p.add_argument("--store-model", metavar="NAME", help="its name in the store, where there are several")
    p.add_argument("--limit", type=int, default=100, metavar="N", help="utterances to measure on (default 100)")
    p.add_argument("--formats", default="png,pdf", help="endings, with commas (default png,pdf)")

    p = add(
        "report",
        "Write one HTML file with everything: heat maps with hover values, lines, provenance.",
        "example:\n  cka-addon report result.json -o report.html --weights PR=result/pr SID=result/sid\n",
    )
    p.add_argument("result", metavar="RESULT", help="file of compute or merge")
    p.add_argument("-o", "--out", required=True, metavar="FILE", help="the HTML file")
    p.add_argument("--measure", default="cka", help="which measure of the result (default cka)")
    p.add_argument("--title", default="Layer-wise similarity (linear CKA)")
    p.add_argument("--weights", nargs="*", default=[], metavar="[TASK=]PATH", help="also show these layer weights")
    p.add_argument("--probes", nargs="*", default=[], metavar="FILE", help="also show these results of probe")

    p = add("probe", probe_cli.HELP, _MODEL_HELP + "\n" + probe_cli.EPILOG)
    probe_cli.add_arguments(p)

    p = add("info", "Say what a feature store, a result or a shard holds.")
    p.add_argument("path", metavar="PATH")
    p.add_argument("--json", action="store_true", help="as JSON")

    p = add("verify", "Read every byte of a feature store and compare it with its manifest; exit 1 on a problem.")
    p.add_argument("path", metavar="STORE")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 1 a named problem, 2 wrong usage."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING if args.quiet else logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "urllib3", "fontTools", "matplotlib", "torch", "numexpr"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from cka_addon.errors import CkaError

    run = {
        "dump": _dump,
        "compute": _compute,
        "merge": _merge,
        "plot": _plot,
        "compare": _compare,
        "trajectory": _trajectory,
        "layer-weights": _layer_weights,
        "report": _report,
        "probe": probe_cli.run,
        "info": _info,
        "verify": _verify,
    }[args.command]
    try:
        return run(args) or 0
    except CkaError as error:
        logger.error("%s: %s", type(error).__name__, error)
        return 1


def _device(args: argparse.Namespace) -> str:
    import torch

    if args.device:
        return args.device
    local = int(os.environ.get("LOCAL_RANK", 0))
    return f"cuda:{local}" if torch.cuda.is_available() else "cpu"


def _processes(device: str) -> tuple[int, int]:
    """Join the processes that torchrun started; (0, 1) without it."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1
    import torch
    import torch.distributed as dist

    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return dist.get_rank(), dist.get_world_size()


def _say(rank: int) -> Callable[..., None]:
    return logger.info if rank == 0 else logger.debug


def _dump(args: argparse.Namespace) -> int:
    from cka_addon import audio, store, store_writer
    from cka_addon.models import load_models

    options, device = from_args(args, DumpOptions), _device(args)
    # Under torchrun every process writes its own part; no process group is needed for that.
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.dry_run:
        models = load_models(args.model, device=device)
        found = audio.find_recordings(args.audio, limit=args.limit)
        logger.warning("%s: %s", args.out, store_writer.estimate([m.info for m in models], found, options))
        return 0
    shard = args.shard or (f"{rank + 1}/{world}" if world > 1 else None)
    path = store_writer.dump(
        args.model,
        args.audio,
        args.out,
        options=options,
        shard=shard,
        limit=args.limit,
        skip_unreadable=args.skip_unreadable,
        device=device,
        progress=not args.quiet and rank == 0,
        announce=_say(rank),
    )
    if (path / "complete.json").is_file():
        summary = store.FeatureStore(path).info()
        logger.info(
            "%s: complete, %d utterances, %s, %d left out",
            path,
            summary["utterances"],
            store.format_bytes(summary["bytes"]),
            len(summary["skipped"]),
        )
    else:
        logger.info("%s: part %s is done, others are still missing", path, shard)
    return 0


def _write_result(result, out: str, parquet: bool) -> None:
    path = Path(out)
    path = path if path.suffix == ".json" else path.with_name(path.name + ".json")
    result.save(path)
    written = [path, result.to_csv(path.with_suffix(".csv"))]
    if parquet:
        written.append(result.to_parquet(path.with_suffix(".parquet")))
    logger.info("%s\nwrote %s", result, ", ".join(map(str, written)))


def _compute(args: argparse.Namespace) -> int:
    from cka_addon.finish import finish
    from cka_addon.run import gather

    device = _device(args)
    rank, _ = _processes(device)
    options = from_args(args, Options)
    source = None
    if args.where or args.within:
        from cka_addon.probe.grouped import grouped
        from cka_addon.sources import open_source

        source = grouped(
            open_source(
                args.model or None,
                args.audio,
                stores=args.store or None,
                limit=args.limit,
                skip_unreadable=args.skip_unreadable,
                device=device,
            ),
            where=args.where,
            within=args.within,
            per_utterance=options.examples == "means",
            progress=not args.quiet and rank == 0,
            announce=_say(rank),
        )
    state = gather(
        args.model or None,
        args.audio,
        stores=args.store or None,
        options=options,
        source=source,
        shard=args.shard,
        limit=args.limit,
        skip_unreadable=args.skip_unreadable,
        device=device,
        progress=not args.quiet,
        announce=_say(rank),
    )
    if rank == 0:
        if args.shard and state.missing():
            path = Path(args.out)
            path = path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")
            logger.info("wrote %s; join all shards with: cka-addon merge ... -o result.json", state.save(path))
        else:
            _write_result(finish(state), args.out, args.parquet)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        import torch.distributed as dist

        dist.barrier()
        dist.destroy_process_group()
    return 0


def _merge(args: argparse.Namespace) -> int:
    from cka_addon.errors import MergeError

    folders = [Path(p).is_dir() for p in args.parts]
    if all(folders):
        from cka_addon.store_writer import merge_stores

        logger.info("wrote %s", merge_stores(args.parts, args.out))
        return 0
    if any(folders):
        raise MergeError("got stores and files; expected all parts of one kind")
    from cka_addon.run import merge

    _write_result(merge(args.parts), args.out, args.parquet)
    return 0


def _compare(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from cka_addon import compare, provenance
    from cka_addon.errors import SpecError
    from cka_addon.result import CKAResult

    files = [a for a in args.results if a.endswith(".json")]
    texts = [a for a in args.results if not a.endswith(".json")]
    if not 1 <= len(files) <= 2:
        raise SpecError(f"got {len(files)} results; expected one or two .json files of compute")
    loaded = [CKAResult.load(f).of(args.measure) for f in files]
    first, second = loaded[0], loaded[-1]
    if len(loaded) == 2:
        modes = [r.details["options"]["mode"] for r in loaded]
        if sorted(modes) == ["full", "minibatch"]:
            text = compare.bias_of_minibatches(*(loaded if modes[1] == "full" else loaded[::-1]))
            sys.stdout.write(text + "\n")
            if not texts:
                return 0
        if texts:
            pairs = [(compare.pair_of(first, t), compare.pair_of(second, t)) for t in texts]
            found = compare.differences(first, second, pairs, confidence=args.confidence)
        else:
            found = compare.every_pair(first, second, confidence=args.confidence)
    else:
        if len(texts) < 2:
            raise SpecError("got fewer than two pairs of layers; expected MODEL/LAYER,MODEL/LAYER twice or more")
        rows = [compare.pair_of(first, t) for t in texts]
        found = compare.differences(first, first, [(rows[0], r) for r in rows[1:]], confidence=args.confidence)
    for item in found:
        sys.stdout.write(f"{item}\n")
    if args.out:
        import pandas

        data = pandas.DataFrame([asdict(d) for d in found])
        logger.info("wrote %s", provenance.write_atomically(args.out, lambda t: data.to_csv(t, index=False)))
    return 0


def _trajectory(args: argparse.Namespace) -> int:
    from cka_addon import trajectory
    from cka_addon.run import compute

    result = compute(
        trajectory.specifications(args.template, args.checkpoints),
        args.audio,
        options=from_args(args, Options),
        limit=args.limit,
        skip_unreadable=args.skip_unreadable,
        device=_device(args),
        progress=not args.quiet,
        announce=logger.info,
    )
    written = trajectory.write(result, args.out, args.formats.split(","))
    logger.info("wrote %s", "\n      ".join(map(str, written)))
    return 0


def _plot(args: argparse.Namespace) -> int:
    from cka_addon import plots
    from cka_addon.result import CKAResult

    result = CKAResult.load(args.result).of(args.measure)
    models = args.models.split(",") if args.models else result.names
    for model in models:
        result.rows(model)
    out, formats = Path(args.out), args.formats.split(",")
    written: list[Path] = []

    def keep(figure, name: str) -> None:
        written.extend(plots.save(figure, out / name, formats))

    for k, a in enumerate(models):
        for b in models[k:]:
            if result.mask[result.rows(b), result.rows(a)].all():
                keep(plots.plot_heatmap(result, a, b)[0], f"heatmap_{a}" if a == b else f"heatmap_{a}_{b}")
    if len(models) > 1:
        keep(plots.plot_grid(result, models)[0], "grid")
    if any(len(result.layers(m)) > 1 and result.mask[result.rows(m), result.rows(m)].all() for m in models):
        keep(plots.plot_adjacent(result, models)[0], "adjacent")
    for target in args.to:
        keep(plots.plot_lines(result, target, models)[0], "lines_" + target.replace("/", "_"))
    written.append(result.to_csv(out / "cka.csv"))
    logger.info("wrote %s", "\n      ".join(map(str, written)))
    return 0


def _layer_weights(args: argparse.Namespace) -> int:
    from cka_addon import layer_weights, plots, provenance
    from cka_addon.errors import SpecError
    from cka_addon.store import FeatureStore

    items = layer_weights.read_many(args.checkpoints)
    if args.store and args.model:
        raise SpecError("got --store and --model; expected one of them to measure the norms on")
    if args.store or args.model:
        source = FeatureStore(args.store) if args.store else args.model
        layers, norms, how = layer_weights.measure_norms(
            source, args.audio, model=args.store_model, limit=args.limit, progress=not args.quiet
        )
        items = [layer_weights.correct(w, layers, norms, how, other_model=args.other_model) for w in items]
    else:
        logger.warning("weights only: layers differ in norm, give --store or --model and --audio for corrected shares")
    out, formats = Path(args.out), args.formats.split(",")
    table = layer_weights.table(items)
    written = [provenance.write_atomically(out / "layer_weights.csv", lambda t: table.to_csv(t, index=False))]
    members: list[dict[str, Any]] = [{"task": w.task, **row} for w in items for row in layer_weights.member_shares(w)]
    if members:
        import pandas

        shares = pandas.DataFrame(members)
        written.append(provenance.write_atomically(out / "member_weights.csv", lambda t: shares.to_csv(t, index=False)))
        for row in members:
            corrected = f", {row['corrected']:.1%} corrected for norms" if "corrected" in row else ""
            logger.info("%-20s %s takes %.1f %%%s", row["task"], row["member"], 100 * row["weight"], corrected)
    about = {**provenance.collect(), "checkpoints": [w.details for w in items]}
    written.append(provenance.write_json(out / "layer_weights.provenance.json", about))
    written += plots.save(plots.plot_layer_weights(items)[0], out / "layer_weights", formats)
    for count in sorted({len(w.weights) for w in items}):
        same = [w for w in items if len(w.weights) == count]
        suffix = f"_{count}_layers" if len({len(w.weights) for w in items}) > 1 else ""
        written += plots.save(plots.plot_layer_weight_map(same)[0], out / f"layer_weight_map{suffix}", formats)
        if all(w.corrected is not None for w in same):
            figure, _ = plots.plot_layer_weight_map(same, corrected=True)
            written += plots.save(figure, out / f"layer_weight_map_corrected{suffix}", formats)
    for w in items:
        best = int((w.weights if w.corrected is None else w.corrected).argmax())
        logger.info("%-20s leans most on layer %d%s", w.task, best, "" if w.corrected is None else " (corrected)")
    logger.info("wrote %s", "\n      ".join(map(str, written)))
    return 0


def _report(args: argparse.Namespace) -> int:
    from cka_addon.layer_weights import read_many
    from cka_addon.report import write_report
    from cka_addon.result import CKAResult

    weights = read_many(args.weights) if args.weights else ()
    sections = []
    if args.probes:
        from cka_addon.probe.report import report_section
        from cka_addon.probe.result import ProbeResult

        sections = [report_section(ProbeResult.load(path)) for path in args.probes]
    result = CKAResult.load(args.result).of(args.measure)
    logger.info("wrote %s", write_report(result, args.out, weights=weights, title=args.title, sections=sections))
    return 0


def _info(args: argparse.Namespace) -> int:
    path = Path(args.path)
    if path.is_dir():
        from cka_addon.store import FeatureStore

        data = FeatureStore(path, allow_incomplete=True).info()
    elif path.suffix == ".safetensors":
        from cka_addon.state import State

        state = State.load(path)
        data = {
            "path": str(path),
            "shard": True,
            "form": state.form,
            "blocks": sorted(state.blocks),
            "missing_blocks": state.missing(),
            "examples": sum(b.examples for b in state.blocks.values()),
            "models": [i.to_dict() for i in state.infos],
            "options": state.plan["options"],
        }
    else:
        from cka_addon.result import CKAResult

        result = CKAResult.load(path)
        data = {"path": str(path), "result": repr(result), **result.details}
    if args.json:
        sys.stdout.write(json.dumps(data, indent=1, default=str) + "\n")
    else:
        sys.stdout.write(_text(data) + "\n")
    return 0


def _text(data: Any, indent: str = "") -> str:
    """Nested data for reading: key: value lines, lists of plain values on one line."""
    lines = []
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        nested = isinstance(value, dict) and value
        listed = isinstance(value, list) and any(isinstance(v, dict) for v in value)
        if nested or listed:
            lines.append(f"{indent}{key}:\n{_text(value, indent + '  ')}")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            shown = f"{value:.4g}" if isinstance(value, float) else shown
            lines.append(f"{indent}{key}: {shown if shown not in ({}, '') else '-'}")
    return "\n".join(lines)


def _verify(args: argparse.Namespace) -> int:
    from cka_addon.store import FeatureStore

    store = FeatureStore(args.path, allow_incomplete=True)
    problems = store.verify(progress=not args.quiet)
    for problem in problems:
        logger.error("%s: %s", args.path, problem)
    if not problems:
        logger.info("%s: %d utterances in %d files, no problem found", args.path, len(store), len(store.files))
    return 1 if problems else 0
