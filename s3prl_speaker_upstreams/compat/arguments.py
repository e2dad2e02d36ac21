"""Arguments of s3prl's command line, made to mean what s3prl's documentation says: ``--local_rank``, ``-k``, ``-l``."""

from __future__ import annotations

import functools
import logging
import os
import sys
from types import ModuleType
from typing import Any

from s3prl_speaker_upstreams.errors import ConfigError

__all__ = [
    "NoSuchLayer",
    "keep_full_paths",
    "name_the_layer",
    "normalize_in_slots",
    "rank_is_unread",
    "spell_local_rank",
]

logger = logging.getLogger(__name__)


class NoSuchLayer(ConfigError, IndexError):
    """A layer was asked for by a number that does not exist."""


# ------------------------------------------------------------------------------------------------- --local_rank


def _runs_the_program() -> bool:
    """Whether this process is ``run_downstream.py``, s3prl's or the one here that calls it."""
    return bool(sys.argv) and os.path.basename(sys.argv[0]) == "run_downstream.py"


def rank_is_unread(module: ModuleType) -> bool:
    """Whether a launcher gave this process a rank in a way that s3prl's parser does not read.

    ``python -m torch.distributed.launch`` passes ``--local-rank=N`` since torch 2.0, which s3prl refuses; ``torchrun``
    only sets LOCAL_RANK, so that each of several processes would train by itself, into one folder.
    """
    if not _runs_the_program() or "LOCAL_RANK" not in os.environ:
        return False
    if any(argument.split("=")[0] == "--local-rank" for argument in sys.argv[1:]):
        return True
    named = any(argument.split("=")[0] == "--local_rank" for argument in sys.argv[1:])
    return not named and int(os.environ.get("WORLD_SIZE", "1")) > 1


def spell_local_rank(module: ModuleType | None = None) -> None:
    """Give the rank to s3prl's parser as ``--local_rank``."""
    others: list[str] = []
    arguments = iter(sys.argv[1:])
    for argument in arguments:
        if argument == "--local-rank":
            next(arguments, None)
        elif not argument.startswith("--local-rank="):
            others.append(argument)
    sys.argv[1:] = [f"--local_rank={os.environ['LOCAL_RANK']}", *others]


# ------------------------------------------------------------------------------------------------- -k, -g


def keep_full_paths(module: ModuleType) -> None:
    """s3prl/downstream/runner.py: files of ``-k`` and ``-g`` go into the experiment's checkpoints by their full path.

    ``-e`` takes both from there, and would look for a relative path below whatever folder it is started in. An
    upstream's ``layer_names`` go with them, so that the checkpoint says what its layer weights are of.
    """
    original = module.Runner.__init__

    @functools.wraps(original)
    def __init__(self: Any, args: Any, config: Any) -> None:
        for name in ("upstream_ckpt", "upstream_model_config"):
            path = getattr(args, name, None)
            if isinstance(path, str) and not os.path.isabs(path) and os.path.exists(path):
                setattr(args, name, os.path.abspath(path))
        original(self, args, config)
        model = getattr(getattr(self, "upstream", None), "model", None)
        names = getattr(getattr(model, "module", model), "layer_names", None)
        if names and not callable(names):
            args.upstream_layer_names = [str(name) for name in names]

    module.Runner.__init__ = __init__


# ------------------------------------------------------------------------------------------------- -l


def name_the_layer(module: ModuleType) -> None:
    """s3prl/upstream/interfaces.py: ``Featurizer`` says which layer ``-l`` is, or that there is none of that number."""
    original = module.Featurizer.__init__

    @functools.wraps(original)
    def __init__(self: Any, upstream: Any, feature_selection: str = "hidden_states", *args: Any, **kwargs: Any) -> None:
        layer = kwargs.get("layer_selection", args[1] if len(args) > 1 else None)
        names = getattr(getattr(upstream, "module", upstream), "layer_names", None)
        if feature_selection != "hidden_states" or not isinstance(layer, int):
            layer = None
        try:
            original(self, upstream, feature_selection, *args, **kwargs)
        except IndexError as error:
            if layer is None:
                raise
            known = f", expected 0 .. {len(names) - 1} ({names[0]} .. {names[-1]})" if names else ""
            raise NoSuchLayer(f"-l {layer}: there is no such layer{known}; -l counts from 0") from error
        if layer is not None:
            what = f"is {names[layer]}" if names else "is taken"
            logger.info("-l %d %s; -l counts from 0", layer, what)

    module.Featurizer.__init__ = __init__


# ------------------------------------------------------------------------------------------------- normalisation


def normalize_in_slots(module: Any) -> None:
    """``Featurizer`` and ``S3PRLUpstream`` leave normalising to an upstream that says how (``normalize_in_slots``).

    s3prl normalises over the whole width of a hidden state, which for layers that stand side by side is not their own.
    """

    def wrap(kind: Any) -> None:
        original = kind.__init__

        @functools.wraps(original)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            inner: Any = getattr(self, "upstream", None) or kwargs.get("upstream", args[0] if args else None)
            while hasattr(inner, "upstream") or hasattr(inner, "module"):
                inner = getattr(inner, "upstream", None) or inner.module
            if getattr(self, "normalize", False) and hasattr(inner, "normalize_in_slots"):
                inner.normalize_in_slots()
                self.normalize = False

        kind.__init__ = __init__

    for name in ("Featurizer", "S3PRLUpstream"):
        if hasattr(module, name):
            wrap(getattr(module, name))
