"""Which project's format an opened file has."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ..errors import CheckpointMismatch
from .files import File, option
from .format import INSIDE, NAMED, Evidence, Format
from .formats import BY_NAME

__all__ = ["FORMATS", "as_told", "detect"]

logger = logging.getLogger(__name__)

FORMATS = tuple(BY_NAME)

# A file is taken for a format from this share of its tensors on.
_ENOUGH = 0.5


def detect(file: File) -> Format:
    """The format of an opened file.

    Where only the user can know (SpeechBrain or 3D-Speaker supervised) this gives SpeechBrain and logs a warning.

    Raises CheckpointMismatch if it is no format that is known, naming the nearest and the first difference from it.

    >>> import torch
    >>> from pathlib import Path
    >>> detect(File.of(Path("x.pt"), {"layer.weight": torch.zeros(2)}))
    Traceback (most recent call last):
    ...
    s3prl_speaker_upstreams.errors.CheckpointMismatch: x.pt: got 1 tensors, first 'layer.weight', expected an \
ECAPA-TDNN in one of the formats native, speechbrain, sslsv, taoruijie, 3dspeaker, rdino, sdpn, wespeaker
    """
    said = _said(file)
    if said is not None:
        return said
    evidence = _evidence(file)
    best = max(found.share for found in evidence.values())
    if best < _ENOUGH:
        raise CheckpointMismatch(
            f"{file.path}: got {_describe(file)}, expected an ECAPA-TDNN in one of the formats {', '.join(FORMATS)}"
            + _nearest(evidence)
            + _canonical_hint(file)
        )
    likely = {name: found for name, found in evidence.items() if found.share == best}
    name = max(likely, key=lambda name: likely[name].strength)
    chosen, found = BY_NAME[name], likely[name]
    if len(likely) > 1 and found.strength <= NAMED:
        logger.warning(
            "%s: the files of %s have the same keys and shapes but different front-ends, and nothing beside the file "
            "tells which it is; taken as %s by %s. To choose pass format=%s (%s)",
            file.path, " and ".join(BY_NAME[name].title for name in likely), chosen.title, found.why,
            " or format=".join(likely), option("format", name),
        )  # fmt: skip
    elif len(likely) > 1:
        logger.info("%s: taken as %s (%s)", file.path, chosen.title, found.why)
    return chosen


def as_told(told: Format, file: File) -> Format:
    """The format that the user names, where the file can be of it.

    A native file says itself what it is; the user's word on what it was before is not needed then.

    Raises CheckpointMismatch if the file's contents show it to be of another format, or of none.

    >>> import torch
    >>> from pathlib import Path
    >>> as_told(BY_NAME["sslsv"], File.of(Path("x.pt"), {"layer.weight": torch.zeros(2)}))
    Traceback (most recent call last):
    ...
    s3prl_speaker_upstreams.errors.CheckpointMismatch: x.pt: got 1 tensors, first 'layer.weight', expected sslsv \
(sslsv); the file looks like none of the known formats (native, speechbrain, sslsv, taoruijie, 3dspeaker, rdino, \
sdpn, wespeaker)
    """
    said = _said(file)
    if said is not None:
        if said is not told:
            logger.warning(
                "%s: is a %s checkpoint, which says itself what it is: format=%s not used",
                file.path, said.name, told.name,
            )  # fmt: skip
        return said
    evidence = _evidence(file)
    own = evidence[told.name]
    sure = own.share >= _ENOUGH and own.strength >= INSIDE
    others = [name for name in evidence if name != told.name and evidence[name].share >= _ENOUGH]
    for name in sorted(others, key=lambda name: (evidence[name].share, evidence[name].strength), reverse=True):
        if not sure and (evidence[name].share > own.share or evidence[name].strength >= INSIDE):
            raise CheckpointMismatch(
                f"{file.path}: got {_describe(file)}, expected {told.title} ({told.name}); the file looks like "
                f"{BY_NAME[name].title}, pass {option('format', name)}"
            )
    if own.share < _ENOUGH:
        raise CheckpointMismatch(
            f"{file.path}: got {_describe(file)}, expected {told.title} ({told.name}); the file looks like none of the "
            f"known formats ({', '.join(FORMATS)}){_nearest(evidence)}{_canonical_hint(file)}"
        )
    return told


def _said(file: File) -> Format | None:
    """The format that a file states in its metadata."""
    stated = (file.metadata or {}).get("format")
    return next((kind for kind in BY_NAME.values() if kind.metadata_format and kind.metadata_format == stated), None)


def _evidence(file: File) -> dict[str, Evidence]:
    """For each format how near a file is to it; strangers are refused by name."""
    group = next((name for name in file.tensors if ".group_tdnn_block." in name or ".mconv." in name), None)
    if group is not None or any(name.startswith("encoder.feature_agg.") for name in file.tensors):
        raise CheckpointMismatch(
            f"{file.path}: is a NeMo speaker model (key {group or 'encoder.feature_agg'!r}). NeMo's ecapa_tdnn uses "
            "group convolutions in place of Res2 and TitaNet is another network: neither can be loaded as ECAPA-TDNN. "
            "Use a checkpoint of another project, for example the entry ecapa_tdnn (SpeechBrain)"
        )
    return {name: kind.evidence(file) for name, kind in BY_NAME.items()}


def _describe(file: File) -> str:
    if not file.tensors:
        return f"no tensors (entries {', '.join(map(repr, sorted(file.entries)[:4])) or 'none'})"
    return f"{len(file.tensors)} tensors, first {next(iter(file.tensors))!r}"


def _nearest(evidence: Mapping[str, Evidence]) -> str:
    name = max(evidence, key=lambda name: evidence[name].share)
    share, lacking = evidence[name][:2]
    if share <= 0.1:  # a few names such as "conv1.weight" are in any file
        return ""
    return f"; the nearest is {BY_NAME[name].title} ({share:.0%} of its names), first without {lacking!r}"


def _canonical_hint(file: File) -> str:
    if {"config", "task"} <= file.entries:
        return "; it is a checkpoint of this package's pre-training: s3prl-speaker export RUN FILE makes a model of it"
    if any("block_1.conv.weight" in name for name in file.tensors):
        return "; it has this package's own names but no configuration: save it with checkpoints.save_native"
    return ""
