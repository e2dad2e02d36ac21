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

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import yaml

from ..errors import ConfigError

__all__ = ["apply_overrides", "build", "parse_override", "to_dict"]

T = TypeVar("T")


def _unknown(key: str, path: str, known: Sequence[str]) -> ConfigError:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean '{path}{near[0]}'?" if near else f"expected one of: {', '.join(known)}"
    return ConfigError(f"unknown key '{path}{key}'; {hint}")


def _wrong(path: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{path}: got {value!r} ({type(value).__name__}), expected {expected}")


def _coerce(kind: Any, value: Any, path: str) -> Any:
    """``value`` as the annotated type ``kind``; ConfigError names ``path`` if it cannot be."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
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
        if value in args:
            return value
        near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
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
