"""Command verbs for checkpoints: ``list``, ``info``, ``fetch``, ``convert``, ``init``.

:func:`add_parsers` adds them to a command line; each sets ``func`` to what runs it, which returns an exit code. Results
go to standard output, everything else to the log. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.digests import file_sha256
from ..errors import SpeakerUpstreamError

__all__ = ["add_parsers"]

logger = logging.getLogger(__name__)

# As `checkpoints.ROLES` and `COPIES`, which would import torch; a test holds them equal.
ROLES = ("teacher", "student", "supervised", "untrained")
COPIES = ("ema", "raw")


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Add the verbs to the subparsers of a command.

    >>> parser = argparse.ArgumentParser(prog="s3prl-speaker")
    >>> add_parsers(parser.add_subparsers())
    >>> parser.parse_args(["info", "ecapa_tdnn"]).name
    'ecapa_tdnn'
    """
    verb = subparsers.add_parser(
        "list",
        help="list the public checkpoints that can be named",
        description="List every named checkpoint: format, size, licence, published EER on VoxCeleb1-O, whether cached.",
    )
    verb.add_argument("--json", action="store_true", help="as JSON, with the full provenance")
    verb.set_defaults(func=_list)

    verb = subparsers.add_parser(
        "info",
        help="tell all about a named checkpoint or a file",
        description="Tell the provenance of a named checkpoint, or open a checkpoint file or folder (of any format) "
        "and tell its format, widths, role, front-end and provenance.",
    )
    verb.add_argument("name", metavar="NAME|PATH", help="an entry of `list`, or a file or folder")
    _reading_options(verb)
    verb.add_argument("--json", action="store_true", help="as JSON")
    verb.set_defaults(func=_info)

    verb = subparsers.add_parser(
        "fetch",
        help="download named checkpoints into the cache",
        description="Download checkpoints once, so that later runs need no network. Interrupted downloads continue.",
    )
    verb.add_argument("names", nargs="+", metavar="NAME|URL", help="entries of `list`, or URLs")
    verb.add_argument("--refresh", action="store_true", help="download again although cached")
    verb.set_defaults(func=_fetch)

    verb = subparsers.add_parser(
        "convert",
        help="convert a checkpoint of any format to this package's own",
        description="Convert a checkpoint to one .safetensors file that holds only the network and says itself what "
        "it is (no --format or front-end choices needed afterwards).",
    )
    verb.add_argument("source", metavar="SRC", help="a file or folder of any format, or an entry of `list`")
    verb.add_argument("target", metavar="DST", help="a file ending in .safetensors, or a folder")
    _reading_options(verb)
    verb.add_argument("--fp16", action="store_true", help="store in half precision: half the size, read as float32")
    verb.set_defaults(func=_convert)

    verb = subparsers.add_parser(
        "init",
        help="write an explicitly untrained checkpoint",
        description="Write a network with random weights, marked as untrained: to try a pipeline where no trained "
        "weights can be had, and as the baseline that a trained network must beat.",
    )
    verb.add_argument("target", metavar="DST", help="a file ending in .safetensors, or a folder")
    verb.add_argument(
        "--dialect", default="speechbrain", help="whose architecture and front-end (default: speechbrain)"
    )
    verb.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    verb.add_argument("--channels", type=int, help="width C of the blocks (default: the dialect's); MFA has 3 C")
    verb.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of the network or the front-end, such as "
        "kind=mfcc n_mfcc=40 deltas=2, or kind=wave n_mels=40"
    )  # fmt: skip
    verb.set_defaults(func=_init)


def _reading_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--format",
        help="what the file is, where it cannot tell, such as speechbrain or 3dspeaker (default: detected)",
    )
    verb.add_argument(
        "--role", choices=ROLES, help="which network of a self-supervised file (default: the one that its project uses)"
    )
    verb.add_argument(
        "--copy",
        choices=COPIES,
        help="of a file that holds trained weights and an average of them: which (default: ema, the average)",
    )
    verb.add_argument(
        "--frontend",
        help="features to feed it, a dialect's name; for RDINO and SDPN files 'rdino' (its authors') or 'modelscope'",
    )
    verb.add_argument(
        "--allow-pickle",
        action="store_true",
        help="open files that could run code when loaded; only for files from somebody you trust",
    )


def _fail(error: SpeakerUpstreamError) -> int:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return 1


def _write(lines: Iterable[str]) -> None:
    try:
        for line in lines:
            print(line)
    except BrokenPipeError:
        # `list | head` closes early; keep Python from complaining once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _table(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _where(name: str) -> str:
    """Where a checkpoint is on this machine, in one word for the table."""
    from .cache import cached
    from .registry import REGISTRY

    if REGISTRY[name].shipped:
        return "included"
    try:
        return "yes" if cached(name) else "by hand" if REGISTRY[name].source == "manual" else "no"
    except SpeakerUpstreamError as error:
        logger.warning("%s", error)
        return "unusable"


def _list(args: argparse.Namespace) -> int:
    from .registry import REGISTRY

    if args.json:
        _write([json.dumps([{**vars(entry), "cached": _where(entry.name)} for entry in REGISTRY.values()], indent=1)])
        return 0
    rows = [("NAME", "FORMAT", "SIZE", "LICENCE", "EER %", "CACHED")]
    for entry in REGISTRY.values():
        licence = entry.licence.split(" (")[0]
        eer = "-" if entry.eer is None else f"{entry.eer:.2f}"
        rows.append((entry.name, entry.format, entry.size_text, licence, eer, _where(entry.name)))
    _write(_table(rows))
    return 0


def _info(args: argparse.Namespace) -> int:
    from .cache import by_hand_path, cached
    from .registry import REGISTRY, lookup

    try:
        if args.name not in REGISTRY and Path(args.name).expanduser().exists():
            return _info_file(Path(args.name).expanduser(), args)
        looks_like_path = os.sep in args.name or args.name.startswith(".") or "." in Path(args.name).suffix
        if args.name not in REGISTRY and looks_like_path:
            return _info_file(Path(args.name), args)  # says that there is none
        entry = lookup(args.name)
    except SpeakerUpstreamError as error:
        return _fail(error)
    path, place = None, f"no; `fetch {entry.name}` or put it by hand at {by_hand_path(entry)}"
    try:
        path = cached(entry.name)
    except SpeakerUpstreamError as error:
        place = f"unusable: {error}"
    facts = {key: value for key, value in vars(entry).items() if value not in (None, "")}
    facts["size"] = entry.size_text
    facts.pop("size_exact", None)
    facts["cached"] = str(path) if path else place
    if path is not None and path.is_file():
        facts["bytes"] = path.stat().st_size
    if entry.shipped and path is not None:
        facts["provenance"] = _native_provenance(path)
    _show(facts, args.json)
    return 0


def _native_provenance(path: Path) -> Mapping[str, Any]:
    from ..checkpoints import read_checkpoint

    return read_checkpoint(path).provenance


def _info_file(path: Path, args: argparse.Namespace) -> int:
    from ..checkpoints import read_checkpoint

    try:
        checkpoint = read_checkpoint(
            path, format=args.format, role=args.role, copy=args.copy, frontend=args.frontend,
            allow_pickle=args.allow_pickle,
        )  # fmt: skip
    except SpeakerUpstreamError as error:
        return _fail(error)
    weights = sum(t.numel() for t in checkpoint.state.values() if t.is_floating_point())
    _show(
        {
            "path": str(path),
            "format": checkpoint.format,
            "role": checkpoint.role,
            "parameters": weights,
            "ecapa": checkpoint.ecapa.to_dict(),
            "frontend": checkpoint.frontend.to_dict(),
            "frontend_from_file": sorted(checkpoint.frontend_buffers),
            "provenance": checkpoint.provenance,
        },
        args.json,
    )
    return 0


def _show(facts: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        _write([json.dumps(facts, indent=1, default=str)])
        return
    lines = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            lines.append(f"{key}:")
            lines += [f"  {k}: {v}" for k, v in value.items()]
        else:
            lines.append(f"{key}: {value}")
    _write(lines)


def _fetch(args: argparse.Namespace) -> int:
    from .cache import resolve

    failed = 0
    for name in args.names:
        try:
            path = resolve(name, refresh=args.refresh)
        except SpeakerUpstreamError as error:
            failed = _fail(error)
        else:
            _write([f"{name}: {path}"])
    return failed


def _convert(args: argparse.Namespace) -> int:
    from .registry import REGISTRY

    try:
        path, provenance = Path(args.source).expanduser(), {}
        if args.source in REGISTRY and not path.exists():
            from .cache import resolve

            entry = REGISTRY[args.source]
            path = resolve(entry.name)
            args.format, args.frontend = args.format or entry.format, args.frontend or entry.frontend
            keep = ("name", "title", "url", "revision", "licence", "training_data", "eer", "citation")
            provenance = {key: getattr(entry, key) for key in keep if getattr(entry, key) not in (None, "")}
        from ..checkpoints import find_file, read_checkpoint, save_native

        checkpoint = read_checkpoint(
            path, format=args.format, role=args.role, copy=args.copy, frontend=args.frontend,
            allow_pickle=args.allow_pickle,
        )  # fmt: skip
        provenance["converted_from_sha256"] = file_sha256(find_file(path, format=args.format, role=args.role))
        target = save_native(checkpoint, args.target, provenance, fp16=args.fp16)
    except SpeakerUpstreamError as error:
        return _fail(error)
    except OSError as error:
        print(f"cannot write {args.target}: {error}", file=sys.stderr)
        return 1
    size = f"{target.stat().st_size / 1e6:.1f} MB"
    _write([f"{target}: {checkpoint.role}, {checkpoint.ecapa.channels} channels, {size} (from {checkpoint.format})"])
    return 0


def _init(args: argparse.Namespace) -> int:
    from ..checkpoints import save_native, untrained
    from ..common.config import parse_override

    try:
        widths: dict[str, Any] = (
            {} if args.channels is None else {"channels": args.channels, "mfa_channels": 3 * args.channels}
        )
        for key, value in map(parse_override, args.set):
            widths[".".join(key)] = value
        target = save_native(untrained(args.dialect, seed=args.seed, **widths), args.target)
    except SpeakerUpstreamError as error:
        return _fail(error)
    logger.info("%s: UNTRAINED random weights (seed %d), fit for testing only", target, args.seed)
    return 0
