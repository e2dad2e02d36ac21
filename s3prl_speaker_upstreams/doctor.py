"""``s3prl-speaker doctor``: what is installed, what is active, and what to do about each problem."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import logging
import os
import platform
import sys
from dataclasses import dataclass, field

from s3prl_speaker_upstreams import __version__, _startup, errors

__all__ = ["Diagnosis", "add_parsers", "examine"]

PACKAGES = (
    "torch",
    "torchaudio",
    "numpy",
    "huggingface_hub",
    "transformers",
    "soundfile",
    "soxr",
    "safetensors",
    "pandas",
    "speechbrain",
)


@dataclass
class Diagnosis:
    """Findings in the order of printing.

    facts : (heading, value) pairs; problems : (what is wrong, what to do) pairs
    """

    facts: list[tuple[str, str]] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        width = max(len(heading) for heading, _ in self.facts)
        lines = [f"{heading:<{width}}  {value}" for heading, value in self.facts]
        if not self.problems:
            lines += ["", "No problems found."]
        for what, remedy in self.problems:
            lines += ["", f"PROBLEM  {what}", f"   do    {remedy}"]
        return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine() -> Diagnosis:
    """Look at everything that decides whether ``run_downstream.py -u ecapa_dino`` works in this environment.

    >>> "python" in dict(examine().facts)  # doctest: +SKIP
    True
    """
    found = Diagnosis()
    found.facts.append(("python", f"{platform.python_version()}  {sys.executable}"))
    found.facts.append(("s3prl_speaker_upstreams", f"{__version__}  {os.path.dirname(__file__)}"))
    for package in PACKAGES:
        found.facts.append((package, _version(package) or "-"))
    _examine_torch(found)
    _examine_start_up(found)
    if _examine_s3prl(found):
        _examine_entries(found)
    _examine_weights(found)
    return found


def _release(version: str) -> tuple[int, ...]:
    """(2, 11) of "2.11.0+cu130"."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def _examine_torch(found: Diagnosis) -> None:
    torchs, torchaudios = _version("torch"), _version("torchaudio")
    if torchs and torchaudios and _release(torchs) != _release(torchaudios):
        if (2, 9) <= _release(torchaudios) < _release(torchs):
            # 2.11 is torchaudio's last release; its extension works with later ones of torch
            found.facts.append(("", f"torchaudio {torchaudios} beside a later torch: works with s3prl by a stand-in"))
        else:
            found.problems.append(
                (
                    f"torch {torchs} and torchaudio {torchaudios} are of different releases and refuse each other",
                    "install a pair, such as: pip install torch==2.11.0 torchaudio==2.11.0",
                )
            )
    import torch

    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found.facts.append(("CUDA devices", str(devices)))


def _examine_start_up(found: Diagnosis) -> None:
    if _startup.switched_off():
        found.facts.append(("start-up hook", f"switched off by {_startup.SWITCH}={os.environ[_startup.SWITCH]}"))
        found.problems.append(
            (
                "the start-up hook is switched off, so s3prl.hub does not get our entries by itself",
                f"unset {_startup.SWITCH}, or run python -m s3prl_speaker_upstreams.run_downstream",
            )
        )
        return
    # _startup was imported above, which installs the hook: whether the .pth did is seen by where it stands
    here = [path for path in sys.path if os.path.isfile(os.path.join(path, "s3prl_speaker_upstreams.pth"))]
    if here:
        found.facts.append(("start-up hook", f"active, from {here[0]}"))
    else:
        found.facts.append(("start-up hook", "no start-up file found"))
        found.problems.append(
            (
                "s3prl_speaker_upstreams.pth is in no site-packages folder: other processes will not have our entries",
                "pip install --force-reinstall --no-deps s3prl-speaker-upstreams (or pip install -e of the checkout)",
            )
        )


def _examine_s3prl(found: Diagnosis) -> bool:
    original, fork = _version("s3prl"), _version("espnet-s3prl")
    if original and fork:
        found.problems.append(
            (
                f"s3prl {original} and ESPnet's fork of it, espnet-s3prl {fork}, are both installed: they share one "
                "folder, in which the one that was installed last has overwritten files of the other",
                "pip uninstall -y s3prl espnet-s3prl, then pip install the one that you want",
            )
        )
    spec = importlib.util.find_spec("s3prl")
    if spec is None or spec.origin is None:
        found.facts.append(("s3prl", "-"))
        found.problems.append(
            ("s3prl is not installed", "pip install s3prl==0.4.18, or espnet-s3prl, its fork, where ESPnet needs that")
        )
        return False
    folder = os.path.dirname(spec.origin)
    is_checkout = os.path.isfile(os.path.join(folder, "downstream", "voxceleb1", "config.yaml"))
    with open(os.path.join(folder, "version.txt"), encoding="utf-8") as file:
        version = file.read().strip()
    kind = "checkout, with yaml and data files" if is_checkout else "PyPI package, without yaml and data files"
    if fork and not original and not is_checkout:
        kind = f"espnet-s3prl, ESPnet's fork: {kind}"
    found.facts.append(("s3prl", f"{version}  {folder}  ({kind})"))
    if not is_checkout:
        found.facts.append(("", "recipes/superb brings the missing yaml and data files"))
    return True


def _examine_entries(found: Diagnosis) -> None:
    from s3prl_speaker_upstreams import compat, registration

    try:
        from s3prl import hub
    except Exception as error:  # whatever keeps s3prl from importing is the finding
        found.facts.append(("s3prl.hub", f"does not import: {type(error).__name__}: {error}"))
        if _startup.switched_off():
            remedy = f"unset {_startup.SWITCH}: these packages need the stand-ins that come with the hook"
        else:
            remedy = (
                "install the tested packages of recipes/env/constraints-current.txt; if it fails with those, report it"
            )
        found.problems.append((f"import s3prl.hub fails: {error}", remedy))
        return
    names = registration.registered(hub)
    found.facts.append(("entries in s3prl.hub", ", ".join(names) or "none"))
    if not names:
        found.problems.append(
            ("s3prl.hub has none of our entries", "call s3prl_speaker_upstreams.register(), and look at the hook above")
        )
    active = [status for status in compat.report() if status.active]
    found.facts.append(("stand-ins for s3prl", str(len(active)) if active else "none needed"))
    for status in active:
        found.facts.append(("", f"{status.name} (gone: {status.removed_in}), for {status.used_by[0]}"))


def _examine_weights(found: Diagnosis) -> None:
    from s3prl_speaker_upstreams import weights

    cached = []
    for name in weights.REGISTRY:
        try:
            cached += [name] if weights.cached(name) is not None else []
        except errors.SpeakerUpstreamError as error:
            found.problems.append((f"{name} cannot be used", str(error)))
    found.facts.append(("weights at hand", ", ".join(cached) or "none"))
    if not cached:
        found.facts.append(("", "s3prl-speaker fetch NAME downloads them, s3prl-speaker list shows the names"))


def _run(args: argparse.Namespace) -> int:
    del args
    logging.disable(logging.INFO)
    diagnosis = examine()
    sys.stdout.write(f"{diagnosis}\n")
    return 1 if diagnosis.problems else 0


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """Add the command ``doctor``."""
    parser = commands.add_parser(
        "doctor",
        help="say what is installed and active, and what to do about each problem",
        description="Tells which s3prl is seen, the versions that matter, whether the start-up hook is active, which "
        "entries are registered, which stand-ins s3prl needs here, and which weights are at hand. Exit status 1 if "
        "there is a problem.",
    )
    parser.set_defaults(func=_run)
