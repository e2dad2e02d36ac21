"""What is fused, and how: from ``-k "wavlm_base_plus+ecapa_dino"``, a yaml file, or keywords."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from s3prl_speaker_upstreams.common.config import build
from s3prl_speaker_upstreams.errors import ConfigError

__all__ = ["FusionConfig", "Member", "parse"]


@dataclass(frozen=True)
class Member:
    """One of the fused upstreams.

    upstream : an entry of ``s3prl.hub``
    name : how its layers are called; the upstream's name by default
    ckpt : its checkpoint, where the entry takes one; in a yaml file relative to that file
    options : further arguments of the entry, such as ``{frontend: sslsv}`` or ``{model_config: FILE}``
    layers : which of its layers, by number (from 0; from the end if negative) or name; all by default
    key : which of its outputs, as ``-s`` takes it
    """

    upstream: str
    name: str = ""
    ckpt: str | None = None
    options: dict = field(default_factory=dict)
    layers: tuple[int | str, ...] | None = None
    key: str = "hidden_states"


@dataclass(frozen=True)
class FusionConfig:
    """Members and what is done with their layers.

    rate : samples per frame of the result, or that of the "coarsest" or "finest" member
    align : a finer member's frames within one frame of the result give their "mean", or the "nearest" one is taken
    layout : "slots": every layer stands in its member's own part of the joined width, with zeros elsewhere, so that a
        weighted sum of all layers is the members' weighted sums side by side; "pad": zeros up to the widest member
    normalize : "none", or "layer_norm" or "rms" of every frame of a layer, over its member's own width
    one_by_one : run utterances singly through members whose values depend on what else is in a batch
    trainable : names of the members that ``-f`` trains; all by default

    >>> FusionConfig((Member("fbank"),)).layout
    'slots'
    """

    members: tuple[Member, ...]
    rate: int | str = "coarsest"
    align: Literal["mean", "nearest"] = "mean"
    layout: Literal["slots", "pad"] = "slots"
    normalize: Literal["none", "layer_norm", "rms"] = "none"
    one_by_one: bool = False
    trainable: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.members:
            raise ConfigError("fusion: got no members, expected at least one; -k NAME+NAME or a yaml file names them")
        if isinstance(self.rate, str) and self.rate not in ("coarsest", "finest"):
            raise ConfigError(f"fusion: got rate={self.rate!r}, expected coarsest, finest, or samples per frame")
        if not isinstance(self.rate, str) and self.rate < 1:
            raise ConfigError(f"fusion: got rate={self.rate}, expected at least 1 sample per frame")
        object.__setattr__(self, "members", _named(self.members))
        names = [member.name for member in self.members]
        for name in self.trainable or ():
            if name not in names:
                raise ConfigError(f"fusion: got trainable {name!r}, expected some of {', '.join(names)}")


def _named(members: Sequence[Member]) -> tuple[Member, ...]:
    """Members with different names: a second one of an upstream is ``NAME_2``."""
    named: list[Member] = []
    for member in members:
        if member.layers is not None and (not member.layers or len(set(member.layers)) != len(member.layers)):
            raise ConfigError(
                f"fusion: {member.upstream}: got layers {list(member.layers)}, expected at least one, each once"
            )
        taken = [other.name for other in named]
        if member.name in taken:
            raise ConfigError(f"fusion: two members are called {member.name!r}; give them different names")
        name, count = member.name or member.upstream, 1
        while name in taken:
            count += 1
            name = f"{member.upstream}_{count}"
        if any(character in name for character in "/:."):
            raise ConfigError(f"fusion: got the name {name!r}, expected one without '/', ':' and '.'")
        named.append(replace(member, name=name))
    return tuple(named)


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a yaml file, members' relative checkpoints taken from its folder."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); fusion takes a yaml file or NAME+NAME") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not yaml ({error}); fusion takes `members:` and options") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: got a {type(values).__name__}, expected `members:` and options")
    values = dict(values)
    if "members" in values:
        values["members"] = [_relative(member, Path(path).expanduser().parent) for member in _listed(values["members"])]
    return values


def _listed(members: Any) -> list[dict[str, Any]]:
    """Members as mappings: of ``"a+b"``, ``["a", {"upstream": "b"}]``, or :class:`Member` objects."""
    if isinstance(members, str):
        members = [name.strip() for name in members.split("+")]
    if not isinstance(members, Sequence):
        raise ConfigError(f"fusion: got members of type {type(members).__name__}, expected a list, or NAME+NAME")
    listed: list[dict[str, Any]] = []
    for member in members:
        if isinstance(member, str) and member:
            listed.append({"upstream": member})
        elif isinstance(member, Member):
            listed.append(vars(member))
        elif isinstance(member, Mapping) and "upstream" in member:
            listed.append(dict(member))
        else:
            raise ConfigError(f"fusion: got the member {member!r}, expected an upstream's name or `upstream: NAME`")
    return listed


def _relative(member: dict[str, Any], folder: Path) -> dict[str, Any]:
    path = member.get("ckpt")
    if isinstance(path, str) and "://" not in path and (folder / path).exists():
        member = {**member, "ckpt": str((folder / path).resolve())}
    return member


def parse(
    ckpt: str | os.PathLike[str] | None = None, model_config: str | os.PathLike[str] | None = None, **options: Any
) -> FusionConfig:
    """The configuration that ``-k`` (``ckpt``), ``-g`` (``model_config``) and keywords say.

    ckpt : names joined by "+", or the path of a yaml file;  model_config : a yaml file;  options : fields of
    :class:`FusionConfig`. Later ones win; members may be named in one place only.

    Raises ConfigError, with nothing loaded or downloaded.

    >>> parse("fbank+ecapa_dino", rate="finest").rate
    'finest'
    >>> parse("fbank", ratte=160)
    Traceback (most recent call last):
    ...
    s3prl_speaker_upstreams.errors.ConfigError: unknown key 'fusion.ratte'; did you mean 'fusion.rate'?
    """
    sources: list[dict[str, Any]] = []
    if ckpt is not None:
        text = os.fspath(ckpt)
        is_file = text.endswith((".yaml", ".yml")) or os.path.isfile(os.path.expanduser(text))
        sources.append(_read(text) if is_file else {"members": text})
    if model_config is not None:
        sources.append(_read(model_config))
    sources.append({key: value for key, value in options.items() if value is not None})
    if sum("members" in source for source in sources) > 1:
        raise ConfigError("fusion: members are named in two places; name them in -k or in the file of -g")
    values: dict[str, Any] = {}
    for source in sources:
        values.update(source)
    if "members" not in values:
        raise ConfigError(
            'fusion: got no members; pass -k "wavlm_base_plus+ecapa_dino", or a yaml file that lists them'
        )
    values["members"] = _listed(values["members"])
    return build(FusionConfig, values, "fusion.")
