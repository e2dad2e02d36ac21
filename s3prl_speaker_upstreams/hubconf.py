"""The upstream entries: what ``-u NAME`` can be.

Four kinds, with s3prl's calling convention ``entry(ckpt=, model_config=, refresh=, **options)``:

* ``ecapa_tdnn_local``, ``ecapa_dino_local``: ``ckpt`` (``-k``) is a path; the network is never touched.
* ``ecapa_tdnn_url``, ``ecapa_dino_url``: ``ckpt`` (``-k``) is a URL, downloaded once into the cache.
* ``fusion``: several upstreams as one; ``ckpt`` (``-k``) is ``NAME+NAME`` or a yaml file, see
  :mod:`s3prl_speaker_upstreams.fusion`.
* one entry for every named checkpoint of :data:`s3prl_speaker_upstreams.weights.REGISTRY` (``ecapa_tdnn``,
  ``ecapa_dino``, ...): its weights are downloaded at first use, unless ``ckpt`` names a local file to use instead.

``ecapa_tdnn_*`` and ``ecapa_dino_*`` read the same formats; they differ in what they accept without a word: the former
supervised models, the latter self-supervised ones, and each says so when it gets the other.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from s3prl_speaker_upstreams.errors import CheckpointUnreadable, ConfigError

if TYPE_CHECKING:
    from s3prl_speaker_upstreams.expert import UpstreamExpert
    from s3prl_speaker_upstreams.fusion.expert import UpstreamExpert as FusionExpert

__all__ = ["ENTRY_MARK", "entries"]

LAYERS = ("block_1", "block_2", "block_3", "block_4")
"""What the hidden states of every entry but ``fusion`` are."""

ENTRY_MARK = "__s3prl_speaker_upstreams__"
"""Attribute that tells our hub entries from everybody else's."""


def _expert(name: str, ckpt: str | os.PathLike[str], **options: Any) -> UpstreamExpert:
    path = os.path.expanduser(ckpt)
    if not os.path.isabs(path) and not os.path.exists(path):
        raise CheckpointUnreadable(
            f"{name}: got the relative path {ckpt}, and there is no such file below {os.getcwd()}; pass the full path "
            f"with -k, or, for an experiment that was trained in another folder (-e), -o \"args.upstream_ckpt='PATH'\""
        )
    from s3prl_speaker_upstreams.expert import UpstreamExpert  # imports s3prl and torch

    return UpstreamExpert(ckpt, **options)


def _family(name: str) -> str:
    return "dino" if name.startswith("ecapa_dino") else "tdnn"


def _is_url(ckpt: str) -> bool:
    return "://" in str(ckpt)


def _local(
    name: str, ckpt: str | None = None, model_config: str | None = None, refresh: bool = False, **options: Any
) -> UpstreamExpert:
    del refresh  # nothing is ever downloaded here
    if ckpt is None:
        raise CheckpointUnreadable(
            f"{name}: got no checkpoint, expected the path of one; pass -k PATH (ckpt=PATH), or use a named entry such "
            f"as {name.removesuffix('_local')}, which downloads its weights"
        )
    if _is_url(ckpt):
        raise CheckpointUnreadable(
            f"{name}: got the URL {ckpt}, expected a path; use -u {name.removesuffix('_local')}_url for URLs"
        )
    return _expert(name, ckpt, model_config=model_config, family=_family(name), **options)


def _url(
    name: str, ckpt: str | None = None, model_config: str | None = None, refresh: bool = False, **options: Any
) -> UpstreamExpert:
    if ckpt is None or not _is_url(ckpt):
        raise CheckpointUnreadable(
            f"{name}: got {ckpt!r}, expected a URL; pass -k URL (ckpt=URL), or use -u "
            f"{name.removesuffix('_url')}_local for a path"
        )
    from s3prl_speaker_upstreams import weights

    path = weights.resolve(ckpt, refresh=refresh)
    return _expert(name, path, model_config=model_config, family=_family(name), **options)


def _named(
    name: str, ckpt: str | None = None, model_config: str | None = None, refresh: bool = False, **options: Any
) -> UpstreamExpert:
    from s3prl_speaker_upstreams import weights

    known = weights.REGISTRY[name]
    options.setdefault("format", known.format)
    if known.frontend is not None:
        options.setdefault("frontend", known.frontend)
    if ckpt is not None and _is_url(ckpt):
        raise ConfigError(f"{name}: got the URL {ckpt}, expected no -k or a path; use -u ecapa_tdnn_url for URLs")
    path = ckpt if ckpt is not None else weights.resolve(name, refresh=refresh)
    return _expert(name, path, model_config=model_config, **options)


def _fusion(
    name: str, ckpt: str | None = None, model_config: str | None = None, refresh: bool = False, **options: Any
) -> FusionExpert:
    from s3prl_speaker_upstreams.fusion.expert import UpstreamExpert as FusionExpert

    return FusionExpert(ckpt, model_config, refresh, **options)


def _entry(function: Callable, name: str, doc: str) -> Callable:
    entry: Any = partial(function, name)
    entry.__name__ = entry.__qualname__ = name
    entry.__module__ = __name__
    entry.__doc__ = doc
    setattr(entry, ENTRY_MARK, True)
    if function is _fusion:
        entry.ckpt_can_be_names = True  # for tools that look whether the file of ckpt= is there
    else:
        entry.layer_names = LAYERS
    return entry


def entries() -> dict[str, Callable]:
    """All entries by name, in the order in which ``--help`` shows them.

    >>> sorted(entries())[:2]  # doctest: +ELLIPSIS
    ['ecapa_dino', 'ecapa_dino_...']
    """
    from s3prl_speaker_upstreams import weights

    found = {}
    for family, words in (("ecapa_tdnn", "ECAPA-TDNN"), ("ecapa_dino", "self-supervised (DINO) ECAPA-TDNN")):
        found[f"{family}_local"] = _entry(_local, f"{family}_local", f"{words} from a local file, ckpt=PATH (-k).")
        found[f"{family}_url"] = _entry(_url, f"{family}_url", f"{words} from a URL, ckpt=URL (-k).")
    found["fusion"] = _entry(_fusion, "fusion", "Several upstreams as one, ckpt=NAME+NAME or a yaml file (-k).")
    for name, known in weights.REGISTRY.items():
        found[name] = _entry(_named, name, f"{known.training_data}; {known.citation} ({known.licence}).")
    return found
