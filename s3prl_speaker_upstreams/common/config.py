"""Typed configuration from YAML and ``key=value``: dataclasses in, unknown keys and wrong types refused by name.

The dataclass is the schema: field names, annotated types and defaults. Supported annotations are ``bool``, ``int``,
``float``, ``str``, ``Literal[...]``, ``X | None``, ``list[X]``, ``dict`` and nested dataclasses.

>>> from dataclasses import dataclass
>>> @dataclass
... class Optim:
...     lr: float = 0.1
>>> build(Optim, {"lr": "1e-3"})          # YAML 1.1 reads 1e-3 as a string; a float field takes it
Optim(lr=0.001)
>>> build(Optim, {"learning_rate": 1})
Traceback (most recent call last):
...
s3prl_speaker_upstreams.errors.ConfigError: unknown key 'learning_rate'; expected one of: lr
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import yaml

from s3prl_speaker_upstreams.common.hints import did_you_mean, nearest
from s3prl_speaker_upstreams.errors import ConfigError

__all__ = ["add_arguments", "apply_overrides", "build", "option", "parse_override", "to_dict", "values_of"]

T = TypeVar("T")


def _unknown(key: str, path: str, known: Sequence[str]) -> ConfigError:
    return ConfigError(f"unknown key '{path}{key}'; {did_you_mean(key, known, prefix=path)}")


def _wrong(path: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{path}: got {value!r} ({type(value).__name__}), expected {expected}")


def _coerce(kind: Any, value: Any, path: str) -> Any:
    """``value`` as the annotated type ``kind``; ConfigError names ``path`` if it cannot be."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        if not isinstance(value, Mapping):
            raise _wrong(path, value, f"a mapping with the keys {', '.join(f.name for f in dataclasses.fields(kind))}")
        return build(kind, value, path + ".")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        choices = [a for a in args if a is not type(None)]
        for choice in choices[:-1]:
            try:
                return _coerce(choice, value, path)
            except ConfigError:
                continue
        return _coerce(choices[-1], value, path)
    if origin is typing.Literal:
        if isinstance(value, bool) and not any(value is a for a in args):
            # YAML 1.1 reads the words off and no as false, on and yes as true
            words = [a for a in args if a in (("on", "yes", "true") if value else ("off", "no", "false"))]
            value = words[0] if len(words) == 1 else value
        if value in args:
            return value
        near = nearest(value, args)
        raise _wrong(
            path, value, f"one of {', '.join(map(repr, args))}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    if origin in (list, tuple, Sequence):
        if isinstance(value, str):
            value = [value] if value else []
        if not isinstance(value, Sequence):
            raise _wrong(path, value, "a list")
        if origin is tuple and len(args) > 1 and args[1] is not Ellipsis:
            if len(value) != len(args):
                raise _wrong(path, value, f"{len(args)} values")
            return tuple(_coerce(a, v, f"{path}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
        items = [_coerce(args[0] if args else Any, v, f"{path}[{i}]") for i, v in enumerate(value)]
        return tuple(items) if origin is tuple else items
    if kind is dict or origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(path, value, "a mapping")
        return dict(value)
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise _wrong(path, value, "true or false")
    if kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise _wrong(path, value, "a whole number")
    if kind is float:
        if isinstance(value, bool):
            raise _wrong(path, value, "a number")
        try:
            return float(value)
        except (TypeError, ValueError):
            raise _wrong(path, value, "a number") from None
    if kind is str:
        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        raise _wrong(path, value, "text")
    raise TypeError(f"{path}: the annotation {kind!r} is not supported by the configuration reader")


def build(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """An instance of the dataclass ``cls`` from ``values``; missing keys take the defaults.

    Raises ConfigError if a key is unknown (with the nearest known name) or a value has the wrong type.
    """
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    kwargs = {}
    for key, value in values.items():
        if key not in known:
            raise _unknown(str(key), path, known)
        kwargs[key] = _coerce(hints[key], value, f"{path}{key}")
    try:
        return cls(**kwargs)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path.rstrip('.') or cls.__name__}: {error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """The plain dictionary (lists, dicts, scalars) that :func:`build` turns back into ``config``."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value

    return plain(config)


def parse_override(text: str) -> tuple[list[str], Any]:
    """``"a.b=3"`` as (["a", "b"], 3); the value is read as YAML: ``true``, ``[1, 2]`` and ``null`` mean what they say.

    >>> parse_override("dino.head.prototypes=2048")
    (['dino', 'head', 'prototypes'], 2048)
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {text!r}: expected key=value, for example optim.lr=0.1")
    try:
        return key.strip().split("."), yaml.safe_load(value) if value != "" else ""
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not YAML: {error}") from error


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``values`` (nested dictionaries) with every dotted ``key=value`` of ``overrides`` set; a new dictionary."""
    result = {k: (dict(v) if isinstance(v, Mapping) else v) for k, v in values.items()}
    for text in overrides:
        keys, value = parse_override(text)
        node = result
        for key in keys[:-1]:
            inner = node.get(key)
            node[key] = inner = dict(inner) if isinstance(inner, Mapping) else {}
            node = inner
        node[keys[-1]] = value
    return result


# ------------------------------------------------------------------------------------------------ command lines
def option(
    default: Any = dataclasses.MISSING, *, help: str, flag: str | None = None, metavar: str | None = None
) -> Any:
    """A dataclass field that :func:`add_arguments` also makes a command-line option of.

    Parameters
    ----------
    default : the field's default; a list or dict is copied for every instance
    help : what the option does; its default and choices are added by themselves
    flag : default ``--name`` with dashes for underscores
    metavar : the placeholder in the help text
    """
    metadata = {"help": help, "flag": flag, "metavar": metavar}
    if isinstance(default, (list, dict)):
        kept = default
        return dataclasses.field(default_factory=lambda: type(kept)(kept), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _plain_kind(kind: Any) -> Any:
    """``kind`` without ``| None``."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(kind) if a is not type(None)]
        return inner[0] if len(inner) == 1 else Any
    return kind


def add_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup, cls: type) -> None:
    """Give ``parser`` an option for every field of the dataclass ``cls`` that was made by :func:`option`.

    Types, choices, defaults and help come from the dataclass, so that they are said once. :func:`values_of` reads the
    result back.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Options:
    ...     mode: str = option("full", help="which estimator")
    ...     batch_size: int = option(256, help="frames at once")
    >>> parser = argparse.ArgumentParser()
    >>> add_arguments(parser, Options)
    >>> build(Options, values_of(parser.parse_args(["--batch-size", "8"]), Options))
    Options(mode='full', batch_size=8)
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if "help" not in field.metadata:
            continue
        kind = _plain_kind(hints[field.name])
        default = field.default_factory() if field.default is dataclasses.MISSING and callable(
            field.default_factory
        ) else field.default  # fmt: skip
        required = default is dataclasses.MISSING
        words = field.metadata["help"]
        if not required and default not in (None, "", False, [], (), {}):
            words += f" (default: {' '.join(map(str, default)) if isinstance(default, (list, tuple)) else default})"
        settings: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": words.replace("%", "%%")}
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction if default is True else "store_true"
        else:
            settings["required"] = required
            if typing.get_origin(kind) is typing.Literal:
                settings["choices"] = typing.get_args(kind)
            elif field.metadata["metavar"] or typing.get_origin(kind) not in (list, tuple, Sequence):
                settings["metavar"] = field.metadata["metavar"] or {int: "N", float: "X"}.get(kind, field.name.upper())
            if typing.get_origin(kind) in (list, tuple, Sequence):
                settings["nargs"] = "+"
        parser.add_argument(field.metadata["flag"] or f"--{field.name.replace('_', '-')}", **settings)


def values_of(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields of ``cls`` that the command line gave, ready for :func:`build` (text for numbers is fine)."""
    given, hints = vars(args), typing.get_type_hints(cls)
    return {f.name: _read(hints[f.name], given[f.name]) for f in dataclasses.fields(cls) if f.name in given}


def _read(kind: Any, value: Any) -> Any:
    """Words of a command line as numbers where the field holds numbers; :func:`build` refuses what is none."""
    kind = _plain_kind(kind)
    if isinstance(value, list):
        inner = (*typing.get_args(kind), Any)[0]
        return [_read(inner, item) for item in value]
    if kind not in (int, float) or not isinstance(value, str):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value
