"""The command `cka-addon probe`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

logger = logging.getLogger("cka_addon")

HELP = (
    "Probe every layer for properties of speech: labels from files, made conditions, computed numbers; with controls."
)
EPILOG = """\
labels, [NAME=]SOURCE[:COLUMN][@UNIT] with UNIT frame, segment or utterance:
  labels.tsv:speaker                     a column of a csv / tsv file
  phones.ctm   dialogues.rttm            CTM, RTTM, Praat TextGrid (grids/:TIER), TIMIT (timit/:phn, timit/:wrd),
  utt2spk      path:speaker              xlabel (labs/:lab), Kaldi, the speaker in the path
  made:channel | snr | tempo | pitch | level              every recording is changed in a known way (-m and -a)
  computed:f0 | energy | speaking_rate | position         numbers, by ridge regression

examples:
  cka-addon probe -m wavlm_base -m fbank -a wavs/ --labels labels.tsv:speaker --labels phones.ctm -o out/
  cka-addon probe -m "dino=s3prl:ecapa_dino_small" --baseline -a wavs/ --labels made:channel --labels made:tempo -o out/
  cka-addon probe --store store/ -a wavs/ --labels word=words.ctm --vectors word=glove.6B.300d.txt -o out/
  cka-addon probe ... --shard 2/8 -o out/      (one of eight processes; the last one to finish also solves)
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declare the options of `probe` on a parser."""
    p.add_argument("-m", "--model", action="append", default=[], metavar="MODEL", help="a model, see compute --help")
    p.add_argument("-a", "--audio", metavar="PATH", help="folder of recordings, or a list file")
    p.add_argument("--store", action="append", default=[], metavar="STORE", help="feature stores instead of models")
    p.add_argument(
        "-l",
        "--labels",
        action="append",
        default=[],
        metavar="LABELS",
        required=True,
        help="a property; repeat for more",
    )
    p.add_argument("-o", "--out", required=True, metavar="FOLDER", help="result, pictures, report; resumes if stopped")
    p.add_argument(
        "--baseline",
        nargs="*",
        metavar="MODEL",
        help="control: the untrained twin of every model, or these untrained models",
    )
    p.add_argument("--no-fbank", action="store_true", help="leave out the control on log mel filter banks")
    p.add_argument("--no-control-task", action="store_true", help="leave out Hewitt and Liang's control task")
    p.add_argument(
        "--control-types",
        metavar="LABELS",
        help="what an example is an instance of, for the control task (words.ctm, labels.tsv:transcript); by itself "
        "a segment between its neighbours, or the utterance",
    )
    p.add_argument(
        "--group",
        metavar="LABELS",
        help="never split these over training and test: FILE:COLUMN, a column, path:speaker or utterance "
        "(default: the speaker, where it is known)",
    )
    p.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE", help="only these utterances")
    p.add_argument("--within", metavar="LABELS", help="take the mean over each value away, e.g. speaker")
    p.add_argument(
        "--as", dest="kinds", action="append", default=[], metavar="NAME=class|number", help="kind of a label"
    )
    p.add_argument("--ignore", default="", metavar="A,B", help="values that are no label, e.g. SIL,sil,sp")
    p.add_argument("--min-count", type=int, default=1, metavar="N", help="leave out classes of fewer examples")
    p.add_argument("--per-utterance", type=int, metavar="N", help="at most N examples of an utterance (default all)")
    p.add_argument("--probes", default="linear", metavar="linear,mlp", help="probe families (default linear)")
    p.add_argument("--mdl", action="store_true", help="also the online code length (minimum description length)")
    p.add_argument("--folds", type=int, default=5, help="folds of whole groups; 1 holds a quarter out (default 5)")
    p.add_argument(
        "--solver",
        choices=("auto", "exact", "stream"),
        default="auto",
        help="exact: in memory to convergence; stream: any number of examples (default: by their number)",
    )
    p.add_argument("--memory", type=int, default=2048, metavar="MIB", help="for examples in memory (default 2048)")
    p.add_argument(
        "--vectors",
        action="append",
        default=[],
        metavar="PROPERTY=FILE",
        help="similarity of the layers' means to vectors: GloVe text, .npz, or 'one-hot'",
    )
    p.add_argument("--noise", metavar="FOLDER", help="recorded noise for made:snr (default: pink noise)")
    p.add_argument("--rooms", metavar="FOLDER", help="recorded room responses for made:channel (default: made ones)")
    p.add_argument("--confidence", type=float, default=0.95, help="of the intervals (default 0.95)")
    p.add_argument("--resamples", type=int, default=1000, help="of the bootstrap (default 1000)")
    p.add_argument("--seed", type=int, default=0, help="of every random choice (default 0)")
    p.add_argument("--limit", type=int, metavar="N", help="use only the first N recordings (sorted by id)")
    p.add_argument("--skip-unreadable", action="store_true", help="leave out and count bad recordings")
    p.add_argument("--shard", metavar="I/N", help="do the I-th of N parts of the models' work")
    p.add_argument("--keep-examples", action="store_true", help="keep OUT/examples for other probes of the same labels")
    p.add_argument("--device", default=None, help="cpu, cuda or cuda:N (default: cuda where there is one)")
    p.add_argument("--formats", default="png,pdf", help="endings of the pictures (default png,pdf)")


def run(args: argparse.Namespace) -> int:
    """Run the command; the same exit statuses as the others."""
    import torch

    from cka_addon.probe import made, solve
    from cka_addon.probe.errors import LabelError
    from cka_addon.probe.run import probe

    kinds = {}
    for item in args.kinds:
        name, equals, kind = item.partition("=")
        if not equals:
            raise LabelError(f"got --as '{item}'; expected NAME=class or NAME=number")
        kinds[name] = kind
    settings = solve.Settings(
        probes=tuple(args.probes.split(",")),
        folds=args.folds,
        solver=args.solver,
        memory=args.memory << 20,
        control=not args.no_control_task,
        mdl=args.mdl,
        confidence=args.confidence,
        resamples=args.resamples,
        min_count=args.min_count,
        seed=args.seed,
    )
    result = probe(
        args.model or None,
        args.audio,
        stores=args.store or None,
        labels=args.labels,
        out=args.out,
        baseline=False if args.baseline is None else (args.baseline or True),
        fbank=not args.no_fbank,
        group=args.group,
        where=args.where,
        within=args.within,
        control_types=args.control_types,
        against=args.vectors,
        kinds=kinds,
        ignore=[v for v in args.ignore.split(",") if v],
        per_utterance=args.per_utterance,
        material=made.Material(args.noise, args.rooms),
        settings=settings,
        shard=args.shard,
        keep_examples=args.keep_examples,
        limit=args.limit,
        skip_unreadable=args.skip_unreadable,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        progress=not args.quiet,
    )
    if result is None:
        return 0
    written = write_all(result, args.out, args.formats.split(","))
    logger.info("%s\nwrote %s", result.summary(), ", ".join(str(p) for p in written))
    return 0


def write_all(result, out: str | Path, formats: list[str]) -> list[Path]:
    """Everything that a result can be: JSON, CSV, Parquet (where pyarrow is), pictures, report."""
    import importlib.util

    from cka_addon import plots, provenance
    from cka_addon.probe.plots import plot_curves, plot_map
    from cka_addon.probe.report import write_report

    folder = Path(out)
    written = [result.save(folder / "probe.json"), result.to_csv(folder / "probe.csv")]
    table = result.differences_frame()
    written.append(provenance.write_atomically(folder / "differences.csv", lambda t: table.to_csv(t, index=False)))
    if importlib.util.find_spec("pyarrow"):
        written.append(result.to_parquet(folder / "probe.parquet"))
    else:
        logger.warning("no Parquet table: pyarrow is not installed (pip install pyarrow)")
    for kind in result.details["settings"]["probes"]:
        written += plots.save(plot_curves(result, probe=kind)[0], folder / "figures" / f"curves_{kind}", formats)
        for model in result.models():
            if len(result.curve(result.names[0], model, kind)) > 1:
                name = f"map_{kind}_{model}"
                written += plots.save(plot_map(result, model, probe=kind)[0], folder / "figures" / name, formats)
    written.append(write_report(result, folder / "report.html"))
    return written
